# SPDX-License-Identifier: Apache-2.0
"""The command line: ``fisherfast info`` measures a network, ``plan`` says what that will take, ``env`` what will run here."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

import fisherfast as ff
from fisherfast import environment, report, timing
from fisherfast import likelihood as likelihoods

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

_TIMED_BATCHES = 8


class FisherType(StrEnum):
    """Whose labels the gradients are taken at."""

    mc = "mc"
    exact = "exact"
    empirical = "empirical"


class Likelihood(StrEnum):
    """What the network's outputs parameterise."""

    categorical = "categorical"
    bernoulli = "bernoulli"
    gaussian = "gaussian"
    causal_lm = "causal-lm"

    def resolve(self) -> likelihoods.Likelihood:
        """The object of this name."""
        return ff.CausalLM() if self is Likelihood.causal_lm else likelihoods.resolve(self.value)


class Structure(StrEnum):
    """What is kept of the Fisher matrix."""

    diagonal = "diagonal"
    kfac = "kfac"
    ekfac = "ekfac"
    gram = "gram"


def _positive(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"must be a finite number > 0, got {value:g}")
    return value


def _prior_scale(text: str) -> float | str:
    if text == "fit":
        return text
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"must be 'fit' or a number > 0, got {text!r}") from None
    _positive(value)
    return value


_MODEL = typer.Option(help="module:function that returns the network, a torch.nn.Module")
_DATA = typer.Option(help="module:function that returns an iterable of (inputs, targets) batches")
_TYPE = typer.Option(help="labels drawn from the model, all of them weighted, or those of the data")
_STRUCTURE = typer.Option(
    help="the diagonal, or blocks where a weight multiplies: Kronecker factors, or eigenvalues in their basis (two passes)"
)
_LIKELIHOOD = typer.Option(help="what the outputs parameterise")
_BETA = typer.Option(callback=_positive, show_default="1 / N", help="what one nat may cost, in units of the mean loss")
_PRIOR = typer.Option(
    parser=_prior_scale, metavar="NUMBER|fit", help="standard deviation of the prior; fit: the best one, by layer"
)
_CENTER = typer.Option(
    show_default="around 0",
    help="module:function that returns the network this one started from: the nats are what was added to it since",
)
_DRAWS = typer.Option(min=1, help="labels drawn per sample, with mc")
_SEED = typer.Option(help="of the drawn labels")
_OUT = typer.Option(file_okay=False, help="folder for the page, the plot, the numbers and the Fisher")
_DEVICE = typer.Option(show_default="where the network is", help="cpu, cuda, cuda:1")
_NUM_SAMPLES = typer.Option(
    min=1, show_default="those of a batch", help="of all data, for gram, which keeps what it knows of each"
)
_ROUNDS = typer.Option(min=0, help=f"timed runs against plain forward+backward, over the first {_TIMED_BATCHES} batches; 0: none")


@app.command()
def info(
    model: Annotated[str, _MODEL],
    data: Annotated[str, _DATA],
    fisher_type: Annotated[FisherType, _TYPE] = FisherType.mc,
    structure: Annotated[Structure, _STRUCTURE] = Structure.diagonal,
    likelihood: Annotated[Likelihood, _LIKELIHOOD] = Likelihood.categorical,
    beta: Annotated[float | None, _BETA] = None,
    prior_scale: Annotated[Any, _PRIOR] = "fit",
    center: Annotated[str | None, _CENTER] = None,
    draws: Annotated[int, _DRAWS] = 1,
    seed: Annotated[int, _SEED] = 0,
    out: Annotated[Path, _OUT] = Path("out"),
    device: Annotated[str | None, _DEVICE] = None,
    rounds: Annotated[int, _ROUNDS] = 5,
) -> None:
    """Measure a network: its Fisher and the information in its weights, by layer; written to a folder."""
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("the report has a plot and matplotlib is not installed; pip install 'fisherfast[plot]'")
    network, make_data = _loaded(model, data, device)
    base = None if center is None else _same_parameters(_network(center, "--center"), network, center)
    resolved = likelihood.resolve()

    def measure(batches: Iterable[Any], progress: bool = False) -> Any:
        labels = fisher_type.value
        return ff.fisher(
            network, batches, structure.value, labels, likelihood=resolved, draws=draws, seed=seed, progress=progress
        )

    console = Console()
    with _kept(out):
        F = measure(_batches(make_data, data), progress=True)
        beta = beta or 1 / F.num_samples
        information = ff.information_in_weights(F, network, prior_scale=prior_scale, beta=beta, center=base)
        curve = report.rate_distortion(F, network, information, center=base)
        ratio = None
        if rounds:
            batches = list(itertools.islice(_batches(make_data, data), _TIMED_BATCHES))
            ratio = timing.against_plain(measure, network, batches, resolved, rounds)
    console.print(report.render(F, information, ratio))
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    for path in report.write_report(out, F, information, ratio, curve=curve, command=command):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


@app.command()
def plan(
    model: Annotated[str, _MODEL],
    data: Annotated[str, _DATA],
    fisher_type: Annotated[FisherType, _TYPE] = FisherType.mc,
    structure: Annotated[Structure, _STRUCTURE] = Structure.diagonal,
    likelihood: Annotated[Likelihood, _LIKELIHOOD] = Likelihood.categorical,
    draws: Annotated[int, _DRAWS] = 1,
    num_samples: Annotated[int | None, _NUM_SAMPLES] = None,
    device: Annotated[str | None, _DEVICE] = None,
) -> None:
    """What measuring a network will take, in memory and work, from a few samples of its first batch; fails if it does not fit."""
    network, make_data = _loaded(model, data, device)
    batch = next(iter(_batches(make_data, data)), None)
    if batch is None:
        raise typer.BadParameter(f"{data} must yield at least one batch, got none", param_hint="--data")
    with _kept():
        found = ff.plan(
            network, batch, structure.value, fisher_type.value, likelihood.resolve(), draws=draws, num_samples=num_samples
        )
    Console().print(found.table())
    if found.problem is not None:
        typer.echo(f"Error: {found.problem}", err=True)
        raise typer.Exit(2)


@app.command()
def env() -> None:
    """Versions, devices, and for each op the backend that will run here and why not the others."""
    Console().print(environment.render())


def _loaded(model: str, data: str, device: str | None) -> tuple[nn.Module, Callable[[], Any]]:
    """The network in eval mode, where it is wanted, and the function that gives its data."""
    # At the end of the path: a folder of the user's that has the name of an installed package must not replace it.
    sys.path.append(os.getcwd())
    make_data = _function(data, "--data")
    network = _network(model, "--model").eval()
    return network if device is None else network.to(device), make_data


def _network(spec: str, option: str) -> nn.Module:
    """What the function returns that ``module:function`` names."""
    network = _function(spec, option)()
    if not isinstance(network, nn.Module):
        raise typer.BadParameter(f"{spec} must return a torch.nn.Module, got {_kind(network)}", param_hint=option)
    return network


def _same_parameters(center: nn.Module, network: nn.Module, spec: str) -> nn.Module:
    """The center, if it has the network's parameters: said before anything is measured."""
    theirs = {name: p.shape for name, p in center.named_parameters()}
    for name, parameter in network.named_parameters():
        if theirs.get(name) != parameter.shape:
            got = f"{list(theirs[name])}" if name in theirs else "none"
            raise typer.BadParameter(
                f"{spec} must have the network's parameters, got {got} for {name!r} {list(parameter.shape)}",
                param_hint="--center",
            )
    return center


def _function(spec: str, option: str) -> Callable[[], Any]:
    """The function that ``module:function`` names."""
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise typer.BadParameter(f"must be module:function, got {spec!r}", param_hint=option)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise typer.BadParameter(
            f"there is no module {error.name!r} here or among the installed packages", param_hint=option
        ) from None
    function = getattr(module, name, None)
    if function is None:
        known = sorted(
            key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module_name
        )
        raise typer.BadParameter(f"module {module_name!r} has no {name!r}; its functions: {known}", param_hint=option)
    if not callable(function):
        raise typer.BadParameter(f"{spec} must be a function, got {_kind(function)}", param_hint=option)
    return function


def _batches(make_data: Callable[[], Any], spec: str) -> Iterable[Any]:
    batches = make_data()
    if not isinstance(batches, Iterable):
        raise typer.BadParameter(
            f"{spec} must return an iterable of (inputs, targets) batches, got {_kind(batches)}", param_hint="--data"
        )
    return batches


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


@contextmanager
def _kept(out: Path | None = None) -> Iterator[None]:
    """On an error keep what was measured, and show the error alone if it is fisherfast's own, made for the user to read."""
    try:
        yield
    except (KeyboardInterrupt, ArithmeticError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        partial = getattr(error, "fisher", None)
        if out is not None and partial is not None and partial.num_samples:
            out.mkdir(parents=True, exist_ok=True)
            partial.save(out / "partial.safetensors")
            typer.echo(f"kept the {partial.num_samples:,} samples measured so far in {out / 'partial.safetensors'}", err=True)
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(130) from None  # what shells expect of a process stopped by Ctrl-C
        if not _ours(error):
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def _ours(error: BaseException) -> bool:
    """Whether fisherfast itself raised the error, rather than the user's code or a library under it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("fisherfast.")
