# SPDX-License-Identifier: Apache-2.0
"""What the command line is pointed at: functions of the user's, ``module:function``, or the folder of a Hugging Face model."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from torch import nn


class Batches:
    """What the user's function returns, anew each time it is gone through: EKFAC reads the data twice."""

    def __init__(self, spec: str) -> None:
        self.spec, self._make = spec, _function(spec, "--data")

    def __iter__(self) -> Iterator[Any]:
        batches = self._make()
        if not isinstance(batches, Iterable):
            raise typer.BadParameter(
                f"{self.spec} must return an iterable of (inputs, targets) batches, got {_kind(batches)}", param_hint="--data"
            )
        return iter(batches)


def loaded(model: str, data: str, device: str | None) -> tuple[nn.Module, Batches]:
    """The network in eval mode, where it is wanted, and its data."""
    # At the end of the path: a folder of the user's that has the name of an installed package must not replace it.
    sys.path.append(os.getcwd())
    batches = Batches(data)
    network = _network(model, "--model").eval()
    return network if device is None else network.to(device), batches


def center(spec: str, network: nn.Module) -> nn.Module:
    """The network that this one started from, if it has the same parameters: said before anything is measured."""
    found = _network(spec, "--center")
    theirs = {name: p.shape for name, p in found.named_parameters()}
    for name, parameter in network.named_parameters():
        if theirs.get(name) != parameter.shape:
            got = f"{list(theirs[name])}" if name in theirs else "none"
            raise typer.BadParameter(
                f"{spec} must have the network's parameters, got {got} for {name!r} {list(parameter.shape)}",
                param_hint="--center",
            )
    return found


def _network(spec: str, option: str) -> nn.Module:
    """What the function returns that ``module:function`` names, or what the folder holds."""
    network = _of_folder(Path(spec), option) if Path(spec).is_dir() else _function(spec, option)()
    if not isinstance(network, nn.Module):
        raise typer.BadParameter(f"{spec} must return a torch.nn.Module, got {_kind(network)}", param_hint=option)
    return network


def _of_folder(folder: Path, option: str) -> Any:
    if not (folder / "config.json").is_file():
        raise typer.BadParameter(f"{folder} must hold a Hugging Face model, got a folder without config.json", param_hint=option)
    try:
        import transformers
    except ImportError:
        raise typer.BadParameter(f"{folder} needs transformers, which is not installed; pip install transformers") from None
    names = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures or ["none"]
    architecture = getattr(transformers, names[0], None)
    if architecture is None:
        raise typer.BadParameter(f"{folder}: architectures must be those of transformers, got {names[0]!r}", param_hint=option)
    return architecture.from_pretrained(folder, local_files_only=True)


def _function(spec: str, option: str) -> Callable[[], Any]:
    """The function that ``module:function`` names."""
    module_name, _, name = spec.partition(":")
    if not (module_name and name) or "/" in module_name or module_name.startswith("."):
        raise typer.BadParameter(
            f"must be module:function, or a folder of a Hugging Face model on this machine, got {spec!r}", param_hint=option
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        hint = f"; leave out .py: {module_name.removesuffix('.py')}:{name}" if module_name.endswith(".py") else ""
        raise typer.BadParameter(
            f"there is no module {error.name!r} here or among the installed packages{hint}", param_hint=option
        ) from None
    function = getattr(module, name, None)
    if function is None:
        known = sorted(
            key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module_name
        )
        raise typer.BadParameter(f"module {module_name!r} has no {name!r}; its functions: {known}", param_hint=option)
    if isinstance(function, nn.Module) or not callable(function):
        raise typer.BadParameter(f"{spec} must be a function, got {_kind(function)}", param_hint=option)
    return function


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
