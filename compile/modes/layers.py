"""What the built-in modes do with the layers of a plain torch model."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ...int8.echo import echo
from ...int8.linear import RotatedLinear
from ...int8.options import check_globs
from ...int8.quantize import drop_kept, eligible_linears
from .config import parse_config
from .errors import ApplyModeError, ModeConfigError


@dataclass(frozen=True)
class LayersConfig:
    """keep_layers: anchored globs over layer names: these stay as they are."""

    keep_layers: tuple[str, ...] = ()

    def __post_init__(self):
        check_globs(self.keep_layers)


@dataclass(frozen=True)
class LayerRecord:
    """Metadata of the built-in modes. layers: (name, ConvRot group or 0, whether it is smoothed)."""

    layers: tuple[tuple[str, int, bool], ...] = ()


def check_chosen(chosen: tuple[tuple[str, str], ...] | None) -> None:
    """Raises ValueError where a list of (layer, method) has a layer twice."""
    for name, count in Counter(name for name, _ in chosen or ()).items():
        if count > 1:
            raise ValueError(f"chosen names the layer '{echo(name)}' twice.")


def check_record(metadata: dict, owner: str, record_class: type = LayerRecord) -> dict:
    """metadata of a file's record, which has the fields of record_class and no others. Raises ModeConfigError."""
    parse_config(record_class, metadata, f"{owner} in the record")
    return metadata


def float_linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """{name: layer} of the eligible Linear layers that are float, prepared or not. A subclass of Linear does something of its own."""
    layers = {name: model.get_submodule(name) for name in eligible_linears(model)}
    return {name: layer for name, layer in layers.items() if type(layer) in (torch.nn.Linear, RotatedLinear)}


def select(layers: Iterable[str], keep_layers: Iterable[str], owner: str) -> list[str]:
    """The names that are not kept. Raises ModeConfigError for a glob that matches none: a typo must not quantize what shall be kept."""
    layers = list(layers)
    if not layers:
        raise ApplyModeError(f"{owner}: this model has no float Linear layer of 64 features or more to work on.")
    try:
        names = drop_kept(layers, keep_layers)
    except ValueError as error:
        raise ModeConfigError(f"{owner}: {error}") from None
    if not names:
        raise ModeConfigError(f"{owner}: keep_layers keeps every layer. Leave this mode out.")
    return names


def replace(model: torch.nn.Module, layers: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    """model with these in the place of the modules of those names, everywhere they are used; another module where the root is one."""
    new = {model.get_submodule(name): layer for name, layer in layers.items()}
    for old, layer in new.items():
        layer.training = old.training
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]
    return new.get(model, model)


def recorded(model: torch.nn.Module, metadata: dict, owner: str) -> list[tuple[str, torch.nn.Module, int, bool]]:
    """(name, layer, group, smoothed) of each layer that metadata names. Raises ApplyModeError for a model that has no such layer."""
    found = []
    for name, group, smoothed in parse_config(LayerRecord, metadata, f"{owner} in the record").layers:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = None
        if type(layer) not in (torch.nn.Linear, RotatedLinear):
            raise ApplyModeError(f"{owner}: the record names the layer '{echo(name)}', which in this model is "
                                 f"{'absent' if layer is None else f'a {type(layer).__name__}'}. It was made for another model.")
        found.append((name, layer, group, smoothed))
    return found
