# SPDX-License-Identifier: Apache-2.0
"""The command line: ``fisherfast info`` measures a network, ``plan`` says what it takes, ``bench`` times it, ``env`` says what runs."""

from __future__ import annotations

import importlib.util
import itertools
import math
import shlex
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import fisherfast as ff
from fisherfast import environment, loading, report, timing
from fisherfast._error import raised_here
from fisherfast.fisher.parse import STRUCTURES
from fisherfast.information import checked_prior_scale
from fisherfast.likelihood import FISHER_TYPES, LIKELIHOODS, resolve

app = typer.Typer(
    help=(__doc__ or "").replace("``", ""), no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False
)

_TIMED_BATCHES = 8


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(ff.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """What all commands have in common."""


def _positive(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"must be a finite number > 0, got {value:g}")
    return value


def _device(text: str | None) -> str | None:
    import torch

    try:
        kind = None if text is None else torch.device(text).type
    except RuntimeError:
        raise typer.BadParameter(f"must be a device, as cpu or cuda:1, got {text!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"must be a device of this machine, got {text!r}; torch sees no GPU")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"must be a device of this machine, got {text!r}: {str(error).splitlines()[0]}") from None
    return text


def _prior_scale(text: str) -> float | str:
    if text == "fit":
        return text
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"must be 'fit' or a number > 0, got {text!r}") from None
    try:
        return checked_prior_scale("info", "prior_scale", value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _one_of(names: Collection[str]) -> dict[str, Any]:
    """What makes an option take one of these: a table of the library's, which an enumeration would repeat."""

    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"must be one of {', '.join(names)}, got {text!r}")
        return text

    return {"parser": parse, "metavar": f"<{'|'.join(names)}>"}


_MODEL = typer.Option(help="module:function that returns the network, a torch.nn.Module; or the folder of a Hugging Face model")
_DATA = typer.Option(help="module:function that returns an iterable of (inputs, targets) batches")
_TYPE = typer.Option(
    **_one_of(FISHER_TYPES),
    help="labels; mc: drawn from the model; exact: all of them, weighted; empirical: the data's (not the Fisher)",
)
_STRUCTURE = typer.Option(
    **_one_of(STRUCTURES),
    help="diagonal; kfac: Kronecker factors; ekfac: corrected eigenvalues in their basis (two passes); gram: exact, small models",
)
_LIKELIHOOD = typer.Option(**_one_of(LIKELIHOODS), help="distribution of the labels that the outputs parameterise")
_BETA = typer.Option(
    callback=_positive,
    show_default="1 / N",
    help="price of a nat in mean loss; N: the samples measured; give 1 / training samples, if those were not what is measured",
)
_PRIOR = typer.Option(
    parser=_prior_scale, metavar="NUMBER|fit", help="standard deviation of the prior; fit: the best one, by layer"
)
_CENTER = typer.Option(
    show_default="around 0",
    help="module:function, or folder, of the network this one started from: the nats are what was added to it since",
)
_DRAWS = typer.Option(min=1, help="labels drawn per sample, with mc")
_SEED = typer.Option(help="seed of the drawn labels")
_OUT = typer.Option(file_okay=False, help="folder for the page, the plot, the numbers and the Fisher")
_MISSING = typer.Option("--allow-missing", help="leave out parameters that cannot be measured, and say so")
_DEVICE = typer.Option(callback=_device, show_default="where the network is", help="cpu, cuda, cuda:1")
_NUM_SAMPLES = typer.Option(min=1, show_default="those of a batch", help="samples in all the data; gram keeps rows of each")
_STRUCTURES = typer.Option(
    "--structure",
    **_one_of(STRUCTURES),
    show_default="diagonal, kfac",
    help="what to time; may be given several times",
)
_TIMES = typer.Option(min=1, help="timed runs of each, beside as many of plain forward+backward")
_ROUNDS = typer.Option(min=0, help=f"timed runs against plain forward+backward, over the first {_TIMED_BATCHES} batches; 0: none")


@app.command()
def info(
    model: Annotated[str, _MODEL],
    data: Annotated[str, _DATA],
    fisher_type: Annotated[str, _TYPE] = "mc",
    structure: Annotated[str, _STRUCTURE] = "diagonal",
    likelihood: Annotated[str, _LIKELIHOOD] = "categorical",
    beta: Annotated[float | None, _BETA] = None,
    prior_scale: Annotated[Any, _PRIOR] = "fit",
    center: Annotated[str | None, _CENTER] = None,
    draws: Annotated[int, _DRAWS] = 1,
    seed: Annotated[int, _SEED] = 0,
    out: Annotated[Path, _OUT] = Path("out"),
    device: Annotated[str | None, _DEVICE] = None,
    rounds: Annotated[int, _ROUNDS] = 5,
    allow_missing: Annotated[bool, _MISSING] = False,
) -> None:
    """Measure a network: its Fisher and the information in its weights, by layer; written to a folder."""
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("the report has a plot and matplotlib is not installed; pip install 'fisherfast[plot]'")
    network, batches = loading.loaded(model, data, device)
    base = None if center is None else loading.center(center, network)
    resolved = resolve(likelihood)

    def measure(batches: Iterable[Any], progress: bool = False) -> Any:
        options: dict[str, Any] = {"draws": draws, "seed": seed, "allow_missing": allow_missing, "progress": progress}
        return ff.fisher(network, batches, structure, fisher_type, likelihood=resolved, **options)

    console = Console()
    _folder(out)
    with _kept(out):
        F = measure(batches, progress=True)
    with _kept():
        kept = report.save_alone(out, F)  # before anything else can fail
    with _kept(done=kept):
        if beta is None:
            beta = 1 / F.num_samples
            console.print(
                f"beta = 1 / {F.num_samples:,}, of the samples measured; if the network was trained on others, give --beta"
            )
        information = ff.information_in_weights(F, network, prior_scale=prior_scale, beta=beta, center=base)
        curve = report.rate_distortion(F, network, information, center=base)
        ratio = None
        if rounds:
            ratio = timing.against_plain(measure, network, _first(batches), resolved, rounds)
    console.print(report.render(F, information, ratio))
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    for path in (kept, *report.write_report(out, F, information, ratio, curve=curve, command=command)):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


@app.command()
def plan(
    model: Annotated[str, _MODEL],
    data: Annotated[str, _DATA],
    fisher_type: Annotated[str, _TYPE] = "mc",
    structure: Annotated[str, _STRUCTURE] = "diagonal",
    likelihood: Annotated[str, _LIKELIHOOD] = "categorical",
    draws: Annotated[int, _DRAWS] = 1,
    num_samples: Annotated[int | None, _NUM_SAMPLES] = None,
    device: Annotated[str | None, _DEVICE] = None,
    allow_missing: Annotated[bool, _MISSING] = False,
) -> None:
    """What measuring a network will take, in memory and work, from a few samples of its first batch; fails if it does not fit."""
    network, batches = loading.loaded(model, data, device)
    (batch,) = _first(batches, 1)
    options: dict[str, Any] = {"draws": draws, "num_samples": num_samples, "allow_missing": allow_missing}
    with _kept():
        found = ff.plan(network, batch, structure, fisher_type, resolve(likelihood), **options)
    Console().print(found.table())
    if found.problem is not None:
        typer.echo(f"Error: {found.problem}", err=True)
        raise typer.Exit(2)


@app.command()
def bench(
    model: Annotated[str, _MODEL],
    data: Annotated[str, _DATA],
    structures: Annotated[list[str] | None, _STRUCTURES] = None,
    fisher_type: Annotated[str, _TYPE] = "mc",
    likelihood: Annotated[str, _LIKELIHOOD] = "categorical",
    draws: Annotated[int, _DRAWS] = 1,
    rounds: Annotated[int, _TIMES] = 7,
    device: Annotated[str | None, _DEVICE] = None,
    allow_missing: Annotated[bool, _MISSING] = False,
) -> None:
    """Time whole runs over the first batches against plain forward+backward of the same batches, alternating, here."""
    network, batches = loading.loaded(model, data, device)
    first, resolved = _first(batches), resolve(likelihood)
    options: dict[str, Any] = {"likelihood": resolved, "draws": draws, "allow_missing": allow_missing, "progress": False}
    table = Table("structure", "times plain", "ms per batch", "plain ms", title=f"{len(first)} batches, median of {rounds} runs")
    for structure in structures or ("diagonal", "kfac"):

        def measure(batches: Iterable[Any], structure: str = structure) -> Any:
            return ff.fisher(network, batches, structure, fisher_type, **options)

        with _kept():
            took = timing.against_plain(measure, network, first, resolved, rounds)
        each = [f"{1e3 * seconds / len(first):.2f}" for seconds in (took.fisher_seconds, took.plain_seconds)]
        table.add_row(structure, f"{took.ratio:.2f}", *each)
    Console().print(table)


@app.command()
def env() -> None:
    """Versions, devices, and for each op the backend that will run here and why not the others."""
    Console().print(environment.render())


def _first(batches: loading.Batches, number: int = _TIMED_BATCHES) -> list[Any]:
    found = list(itertools.islice(batches, number))
    if not found:
        raise typer.BadParameter(f"{batches.spec} must yield at least one batch, got none", param_hint="--data")
    return found


@contextmanager
def _kept(out: Path | None = None, done: Path | None = None) -> Iterator[None]:
    """On an error keep what was measured, or say where it is kept (``done``), and show the error alone if it is fisherfast's own, made
    for the user to read.
    """
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        partial = getattr(error, "fisher", None)
        if out is not None and partial is not None and partial.num_samples:
            partial.save(out / "partial.safetensors")
            typer.echo(f"kept the {partial.num_samples:,} samples measured so far in {out / 'partial.safetensors'}", err=True)
        if done is not None:
            typer.echo(f"the measured Fisher is kept in {done}", err=True)
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(130) from None  # what shells expect of a process stopped by Ctrl-C
        if isinstance(error, typer.BadParameter) or not raised_here(error):
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def _folder(out: Path) -> None:
    """Make the folder, and write to it, while nothing is lost if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"0")
    except OSError as error:
        raise typer.BadParameter(
            f"must be a folder that can be made and written to, got {out}: {error.strerror}", param_hint="--out"
        ) from None
