"""The mode int8: Linear layers with INT8 weights and activations (W8A8), all of them or those that a search chooses."""
from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any, Literal

import torch

from ...int8.echo import echo
from ...int8.hadamard import group_size
from ...int8.linear import Int8Linear, marker
from ...int8.plan import measure
from ...int8.precision import FLOAT, choose_precision
from ...int8.report import as_number
from ...int8.structure import equivalent_layers
from .errors import ApplyModeError, ModeConfigError
from .layers import LayersConfig, check_chosen, check_record, float_linears, recorded, replace, select
from .mode import Mode
from .registry import MODES
from .search import Searcher
from .smoothquant import observe

# Elements of a weight that tell it from another of the same shape.
SAMPLED = 4096


@dataclass(frozen=True)
class Int8Config(LayersConfig):
    """min_sqnr_db: layers whose own output would be noisier stay float; 0: no limit. max_bytes: of the whole
    model's parameters and buffers: as few layers as that takes become INT8, those that add the least noise; 0: no limit. per: "role":
    equal layers of equal blocks are decided together, so that blocks still share one compiled program. chosen: what the search found,
    (layer, "float" | "rowwise" | "convrot"); None: not searched."""

    min_sqnr_db: float = 0.0
    max_bytes: int = 0
    per: Literal["layer", "role"] = "layer"
    chosen: tuple[tuple[str, Literal["float", "rowwise", "convrot"]], ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_chosen(self.chosen)
        if not 0 <= self.min_sqnr_db <= 100:
            raise ValueError(f"min_sqnr_db is a ratio in dB from 0 (off) to 100, not {self.min_sqnr_db:g}.")
        if self.max_bytes < 0:
            raise ValueError(f"max_bytes is a size from 0 (off) on, not {self.max_bytes}.")


@MODES.register
class Int8(Mode):
    """mode_kwargs, where a limit is set: forward_loop, checkpoint, progress, interrupt; see search.Searcher."""

    name = "int8"
    config_class = Int8Config
    next_prohibited_modes = frozenset({"smoothquant", "convrot", "int8"})
    export_mode = "export"

    def needs_search(self, config) -> bool:
        return config.chosen is None and bool(config.min_sqnr_db or config.max_bytes)

    @property
    def search_algorithm(self):
        return PrecisionSearch

    def convert(self, model, config, **_):
        layers = float_linears(model)
        if config.chosen is None:
            rotate = dict.fromkeys(select(layers, config.keep_layers, self.name), False)
        else:
            rotate = {name: method == "convrot" for name, method in config.chosen if method != FLOAT}
            if unknown := [name for name in rotate if name not in layers]:
                raise ModeConfigError(f"int8: chosen names the layer '{echo(unknown[0])}', which is no float Linear layer of this model. "
                                      "Set chosen to null to search again.")
        new = {}
        for name, rotated in rotate.items():
            layer = layers[name]
            try:
                new[name] = Int8Linear.from_float(layer.weight, layer.bias, rotated or bool(getattr(layer, "group", 0)),
                                                  getattr(layer, "pre_quant_scale", None))
            except ValueError as error:
                raise ApplyModeError(f"int8: layer '{echo(name)}': {error}. Check the checkpoint file.") from error
        return replace(model, new), {"layers": [[name, layer.group, layer.pre_quant_scale is not None] for name, layer in new.items()]}

    def update_for_restore(self, config, metadata):
        return config, check_record(metadata, self.name)

    def restore(self, model, config, metadata):
        new = {}
        for name, layer, group, smoothed in recorded(model, metadata, self.name):
            try:
                new[name] = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None, group, smoothed, layer.weight.dtype,
                                       layer.weight.device)
            except ValueError as error:
                raise ApplyModeError(f"int8: layer '{echo(name)}': {error}. The record was made for another model.") from error
        return replace(model, new)


class PrecisionSearch(Searcher):
    """Measures each layer's SQNR in INT8 on the model's own activations, and chooses; see choose_precision. The measurements in a
    checkpoint serve any limit."""

    def steps(self) -> list[str]:
        self.layers = float_linears(self.model)
        return select(self.layers, self.config.keep_layers, self.owner)

    def identity(self, step: str) -> str:
        layer = self.layers[step]
        weight = layer.weight.detach().reshape(-1)
        sample = weight[torch.linspace(0, weight.numel() - 1, min(SAMPLED, weight.numel()), device=weight.device).long()].float().cpu()
        scale = getattr(layer, "pre_quant_scale", None)
        what = [str(tuple(layer.weight.shape)), str(layer.weight.dtype), str(self._methods(layer)), sample.numpy().tobytes(),
                b"" if scale is None else scale.cpu().numpy().tobytes()]
        return hashlib.sha256(b"|".join(part.encode() if isinstance(part, str) else part for part in what)).hexdigest()

    def before(self, steps: list[str]) -> None:
        self.stats = observe(self.model, {step: self.layers[step] for step in steps}, self.forward_loop, self.owner)

    def measure(self, step: str) -> dict[str, float]:
        if step not in self.stats:  # never called: nothing is known, so it stays float
            return {}
        layer = self.layers[step]
        weight = layer.weight.detach()
        x = self.stats.pop(step).sample().to(weight.device)
        try:
            return {method: as_number(measure(weight, x, method == "convrot", getattr(layer, "pre_quant_scale", None)))
                    for method in self._methods(layer)}
        except ValueError as error:
            raise ApplyModeError(f"{self.owner}: layer '{step}': {error}. Check the checkpoint file.") from error

    def decide(self, results: Mapping[str, Any]):
        config = self.config
        saved = {name: _bytes_saved(self.layers[name].weight) for name, methods in results.items() if methods}
        size = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        together = equivalent_layers(self.model, results) if config.per == "role" else None
        try:
            chosen = choose_precision(results, saved, size - config.max_bytes if config.max_bytes else None, config.min_sqnr_db, together)
        except ValueError as error:
            limit = f" with no layer below {config.min_sqnr_db:g} dB" if config.min_sqnr_db else ""
            raise ModeConfigError(f"{self.owner}: {error} to get from {size} bytes to max_bytes = {config.max_bytes}{limit}. Raise "
                                  f"max_bytes{', or lower min_sqnr_db' if config.min_sqnr_db else ''}.") from None
        return with_changes(config, chosen=tuple(chosen.items()))

    @staticmethod
    def _methods(layer) -> tuple[str, ...]:
        if getattr(layer, "group", 0):
            return ("convrot",)
        return ("rowwise", "convrot") if group_size(layer.in_features) else ("rowwise",)


def _bytes_saved(weight: torch.Tensor) -> int:
    """At least, as INT8: the longest marker is counted."""
    return weight.nbytes - (weight.numel() + 4 * weight.shape[0] + marker(group_size(weight.shape[1])).nbytes)
