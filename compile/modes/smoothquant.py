"""The mode smoothquant: outliers of a layer's input move into its weight (arXiv 2211.10438)."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...int8.calibrate import LayerStats, collect
from ...int8.linear import RotatedLinear
from ...int8.plan import ALPHAS, measure, smoothing_scale
from .errors import ApplyModeError, ModeConfigError
from .layers import LayersConfig, check_record, float_linears, recorded, replace, select
from .mode import Mode
from .registry import MODES


@dataclass(frozen=True)
class SmoothQuantConfig(LayersConfig):
    """alpha: how much moves from input to weight, 0 to 1; None: of plan.ALPHAS, what measures best."""

    alpha: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a share from 0 to 1, not {self.alpha:g}.")


@MODES.register
class SmoothQuant(Mode):
    """mode_kwargs: forward_loop(model) calls the model with what is typical; progress(done, total); interrupt()."""

    name = "smoothquant"
    config_class: ClassVar[type] = SmoothQuantConfig
    next_prohibited_modes = frozenset({"smoothquant"})
    export_mode = "export"

    def convert(self, model, config, forward_loop: Callable | None = None, progress=None, interrupt=None, **_):
        layers = float_linears(model)
        names = select(layers, config.keep_layers, self.name)
        stats = observe(model, {name: layers[name] for name in names}, forward_loop, self.name)
        new = {}
        for done, name in enumerate(stats):
            if interrupt:
                interrupt()
            if progress:
                progress(done, len(stats))
            new[name] = RotatedLinear(layers[name].weight, layers[name].bias, _scale(layers[name].weight, stats[name], config.alpha))
        return replace(model, new), {"layers": [[name, 0, True] for name in new]}

    def update_for_restore(self, config, metadata):
        return config, check_record(metadata, self.name)

    def restore(self, model, config, metadata):
        return replace(model, {name: RotatedLinear(layer.weight, layer.bias, torch.ones(layer.in_features, device=layer.weight.device))
                               for name, layer, _, _ in recorded(model, metadata, self.name)})


def observe(model, layers: dict, forward_loop: Callable | None, owner: str) -> dict[str, LayerStats]:
    """What the layers are called with while forward_loop calls the model, in evaluation mode."""
    if forward_loop is None:
        raise ModeConfigError(f"{owner} looks at the model's activations: pass mode_kwargs={{'forward_loop': f}}, where f(model) calls it.")
    training = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), collect(layers) as stats:
            forward_loop(model.eval())
    finally:
        for module, flag in training:
            module.training = flag
    if not stats:
        raise ApplyModeError(f"{owner}: forward_loop called none of the layers.")
    # In the order of the layers: that of the calls may differ from run to run.
    return {name: stats[name] for name in layers if name in stats}


def _scale(weight: torch.Tensor, stats: LayerStats, alpha: float | None) -> torch.Tensor:
    weight = weight.detach()
    if alpha is not None:
        return smoothing_scale(weight, stats.amax, alpha)
    scales = [torch.ones_like(stats.amax)] + [smoothing_scale(weight, stats.amax, value) for value in ALPHAS]
    x = stats.sample().to(weight.device)
    return max(scales, key=lambda scale: measure(weight, x, rotate=False, pre_quant_scale=scale))
