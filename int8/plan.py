"""How each layer is quantized, decided by what it costs in the layer's own output."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .calibrate import LayerStats
from .kernels import ops
from .options import Int8Options
from .precision import FLOAT, choose_precision
from .quantize import quantize_weight

# SmoothQuant's migration strength (arXiv 2211.10438, section 4.2): how much of the outliers goes from input to weight.
ALPHAS = (0.5, 0.75)
MIN_SMOOTHING = 1e-5
# dB that smoothing must gain on average to be worth its multiplication.
WORTH_SMOOTHING = 0.2


@dataclass
class LayerPlan:
    """What becomes of one layer. method: float (left as it is), rowwise, convrot, or smoothquant (smoothed, then rotated).
    pre_quant_scale: [K] fp32 that the input is multiplied with, for smoothquant. sqnr: {method: dB} as measured on the layer's own
    inputs, empty where none were. reason: why it stays float. tokens: rows of the largest call that was seen, 0 where none was. times:
    milliseconds of such a call in float and as INT8, empty where it was not timed. shape: (N, K) of its weight, where it was asked for."""

    name: str
    method: str
    pre_quant_scale: torch.Tensor | None = None
    sqnr: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    tokens: int = 0
    times: tuple[float, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def rotate(self) -> bool:
        return self.method in ("convrot", "smoothquant")

    def __str__(self):
        measured = ", ".join(f"{method} {db:.1f} dB" for method, db in self.sqnr.items())
        return f"{self.name}: {self.method}" + (f" ({measured})" if measured else "") + (f", {self.reason}" if self.reason else "")


def smoothing_scale(weight: torch.Tensor, amax: torch.Tensor, alpha: float) -> torch.Tensor:
    """pre_quant_scale [K] fp32 for weight [N, K] and inputs of largest magnitude amax [K]: 1 / (amax**alpha / |W|max**(1 - alpha)),
    with a geometric mean of 1. A channel that is zero in the weight or in every input is left alone."""
    weight_amax = weight.float().abs().amax(dim=0)
    amax = amax.to(weight_amax)
    scale = weight_amax.clamp_min(MIN_SMOOTHING) ** (1 - alpha) / amax.clamp_min(MIN_SMOOTHING) ** alpha
    used = (weight_amax > MIN_SMOOTHING) & (amax > MIN_SMOOTHING)
    if not used.any():
        return torch.ones_like(scale)
    scale = scale / scale[used].log().mean().exp()
    return torch.where(used, scale, torch.ones_like(scale))


def sqnr_db(want: torch.Tensor, got: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB, of what is finite in want; infinite where the two are equal there, minus infinity where got
    is not finite."""
    known = want.isfinite()
    noise = (want - got)[known].double().square().sum().item()
    if noise == 0:
        return math.inf
    ratio = want[known].double().square().sum().item() / noise
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else -math.inf


def measure(weight: torch.Tensor, x: torch.Tensor, rotate: bool, pre_quant_scale: torch.Tensor | None = None) -> float:
    """SQNR in dB of x [M, K] @ weight [N, K].T in INT8 against fp32."""
    weight, x = weight.float(), x.float()
    qweight, scale, group = quantize_weight(weight if pre_quant_scale is None else weight / pre_quant_scale, rotate)
    # "torch": as exact as the others, and it does not spend the time for choosing kernels on products in fp32, which no model runs.
    return sqnr_db(x @ weight.t(), ops.int8_linear(x, qweight, scale, group=group, pre_quant_scale=pre_quant_scale, kernel="torch"))


def measure_layer(name: str, weight: torch.Tensor, stats: LayerStats, options: Int8Options) -> LayerPlan:
    """The layer of weight [N, K], on weight's device, with every method that options allow measured; the method is still open."""
    x = stats.sample().to(weight.device)
    plan = LayerPlan(name, "", tokens=stats.tokens)
    if options.method in ("rowwise", "auto"):
        plan.sqnr["rowwise"] = measure(weight, x, rotate=False)
    if options.method != "rowwise":
        plan.sqnr["convrot"] = measure(weight, x, rotate=True)
    if options.method in ("smoothquant", "auto"):
        # A layer that gains nothing keeps a scale of one.
        plan.sqnr["smoothquant"], plan.pre_quant_scale = plan.sqnr["convrot"], torch.ones_like(stats.amax)
        for alpha in ALPHAS:
            scale = smoothing_scale(weight, stats.amax, alpha)
            if (db := measure(weight, x, rotate=True, pre_quant_scale=scale)) > plan.sqnr["smoothquant"]:
                plan.sqnr["smoothquant"], plan.pre_quant_scale = db, scale
    return plan


def choose_methods(plans: list[LayerPlan], options: Int8Options) -> None:
    """Sets the method of layers that are the same layer of equal blocks. They share one, or the blocks would no longer compile to one
    program; only a layer below min_sqnr_db stays float by itself."""
    method = options.method
    if method == "auto":
        if _mean(plans, "smoothquant") > _mean(plans, "convrot") + WORTH_SMOOTHING:
            method = "smoothquant"
        else:
            method = "rowwise" if all(plan.sqnr["rowwise"] >= plan.sqnr["convrot"] for plan in plans) else "convrot"
    for plan in plans:
        plan.method = method
        if method != "smoothquant":
            plan.pre_quant_scale = None
        if plan.sqnr[method] < options.min_sqnr_db:
            plan.method, plan.pre_quant_scale, plan.reason = "float", None, f"below {options.min_sqnr_db:g} dB"


def fit_size(plans: list[LayerPlan], saved: Mapping[str, int], must_save: int, together: Sequence[Sequence[str]]) -> None:
    """Leaves those layers float that need not be INT8 to save must_save bytes; see precision.choose_precision. saved: {layer: bytes}.

    Raises ValueError where must_save cannot be reached.
    """
    int8 = {plan.name: plan for plan in plans if plan.method != FLOAT}
    unmeasured = [name for name, plan in int8.items() if plan.method not in plan.sqnr]  # never called: they add no noise
    measured = {name: {plan.method: plan.sqnr[plan.method]} for name, plan in int8.items() if name not in unmeasured}
    chosen = choose_precision(measured, saved, must_save - sum(saved[name] for name in unmeasured), together=[
        [name for name in group if name in measured] for group in together])
    for name, method in chosen.items():
        if method == FLOAT:
            int8[name].method, int8[name].pre_quant_scale, int8[name].reason = FLOAT, None, "not needed for max_mb"


def _mean(plans: list[LayerPlan], method: str) -> float:
    return sum(plan.sqnr[method] for plan in plans) / len(plans)
