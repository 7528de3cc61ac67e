"""What becomes of each layer of a model: by the noise and the time that INT8 costs it, measured on this machine."""
from __future__ import annotations

import functools
import logging
from collections import Counter
from dataclasses import replace

import comfy.model_management
import comfy.ops
import comfy.utils
import torch

from ...int8.calibrate import LayerStats
from ...int8.options import Int8Options
from ...int8.plan import LayerPlan, choose_methods, fit_size, measure_layer
from ...int8.precision import FLOAT
from ...int8.report import NOT_TIMED, ProgressCallback, no_progress
from ...int8.structure import equivalent_layers
from ..check.linear_table import Row, time_in_turn
from .int8_layer import _connect_kernels, _int8_layer, compute_dtype_of, root_of
from .int8_source import pristine_weight, source_of

logger = logging.getLogger(__name__)

# One of two is faster if it takes less than this share of the other's time: less is noise.
WORTH = 0.95
SECONDS = 0.2  # of timing, for a shape


def plan_model(patcher, names, stats: dict[str, LayerStats], options: Int8Options, on_progress: ProgressCallback = no_progress,
               known: dict[str, LayerPlan] | None = None) -> list[LayerPlan]:
    """A plan for each named layer of patcher from what it was fed; a layer at a time on the patcher's device. Changes nothing: this is
    the dry run as well. known: layers that are measured already; it gets those that are measured now, for an interrupted search."""
    known = {} if known is None else known
    progress = comfy.utils.ProgressBar(len(names))
    result: list[LayerPlan] = []
    for group in equivalent_layers(root_of(patcher), names):
        measured: list[LayerPlan] = []
        for name in group:
            comfy.model_management.throw_exception_if_processing_interrupted()
            on_progress(None, f"measuring {len(result) + len(measured)}/{len(names)}")
            if name in stats:
                if name not in known:
                    weight = source_of(patcher, name)[0].to(patcher.load_device)
                    try:
                        known[name] = measure_layer(name, weight, stats[name], options)
                    except ValueError as error:
                        raise ValueError(f"INT8 Quantize Model: layer '{name}': {error}. Check the checkpoint file.") from error
                measured.append(known[name])
            else:  # not used with these inputs (ControlNet branches, unused embedders)
                result.append(LayerPlan(name, "rowwise" if options.method == "rowwise" else "convrot", reason="never called"))
            progress.update(1)
        if measured:
            choose_methods(measured, options)
            result += measured
    for plan in result:
        plan.shape = tuple(pristine_weight(patcher, plan.name).shape)
    if options.faster_only or _leaves_slower(options, patcher.load_device):
        result = [replace(plan) for plan in result]  # an interrupted search goes on with what was measured
        _keep_slower(patcher, result, options, on_progress)
    if options.max_mb:
        _fit_size(patcher, result, options)
    measured = [(plan.sqnr[plan.method], plan.name) for plan in result if plan.method in plan.sqnr]
    if measured:
        logger.info("INT8: %s measured %d layers: %s; least SQNR %.1f dB (%s)", options.method, len(measured),
                    ", ".join(f"{count} {method}" for method, count in Counter(p.method for p in result).items()), *min(measured))
    for plan in result:
        logger.debug("INT8: %s", plan)
    return result


def _leaves_slower(options: Int8Options, device: torch.device) -> bool:
    """Whether auto leaves layers float that are slower as INT8. Not on a CPU, where INT8 is for the memory: the two take about as long."""
    return options.method == "auto" and not options.max_mb and device.type == "cuda"


def _keep_slower(patcher, plans: list[LayerPlan], options: Int8Options, on_progress: ProgressCallback) -> None:
    """Leaves those layers float that are slower as INT8; with faster_only those too that are no faster, or were not timed."""
    _connect_kernels()
    dtype = compute_dtype_of(patcher)
    short = set()  # for these memory was: they are all decided alike
    for number, plan in enumerate(plans):
        comfy.model_management.throw_exception_if_processing_interrupted()
        on_progress(None, f"timing {number}/{len(plans)}")
        n, k = plan.shape
        size = plan.tokens, k, n, "rowwise" if plan.method == "rowwise" else "convrot"
        if plan.tokens and size not in short:
            try:
                plan.times = linear_times(patcher.load_device, dtype, *size, options.kernel)
            except torch.OutOfMemoryError:
                short.add(size)
                logger.warning("INT8: out of memory while layers from %d to %d channels were timed. They are decided without.", k, n)
        float_ms, int8_ms = plan.times or (0.0, 0.0)
        stays = int8_ms >= WORTH * float_ms if options.faster_only else float_ms < WORTH * int8_ms
        if stays and plan.method != FLOAT:
            reason = NOT_TIMED if size in short else "no faster as INT8" if plan.tokens else "never called"
            plan.method, plan.pre_quant_scale, plan.reason = FLOAT, None, reason


@functools.lru_cache(1024)
def linear_times(device: torch.device, dtype: torch.dtype, rows: int, k: int, n: int, method: str, kernel: str) -> tuple[float, ...]:
    """Milliseconds of a layer from k to n channels over rows tokens, in dtype and as INT8 by kernel, as ComfyUI calls them; empty where
    one of the two cannot run, or INT8 computes something else. torch.OutOfMemoryError where memory is short."""
    generator = torch.Generator(device).manual_seed(0)  # of its own: samplers draw from torch's
    weight = (torch.randn(n, k, device=device, generator=generator) / k ** 0.5).to(dtype)
    x = torch.randn(rows, k, device=device, generator=generator).to(dtype)
    linear = comfy.ops.disable_weight_init.Linear(k, n, bias=False, device=device, dtype=dtype)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    int8 = _int8_layer(weight, None, LayerPlan("", method), kernel, device, device, dtype)
    row = Row("", rows, k, n)
    time_in_turn({FLOAT: lambda: linear(x), "int8": lambda: int8(x)}, row, device,
                 comfy.model_management.throw_exception_if_processing_interrupted, SECONDS)
    for reason in row.failed.values():
        if reason.startswith(torch.OutOfMemoryError.__name__):
            raise torch.OutOfMemoryError(reason)
    if row.failed:
        logger.debug("INT8: %d rows from %d to %d channels were not timed: %s", rows, k, n, row.failed)
        return ()
    return row.milliseconds[FLOAT], row.milliseconds["int8"]


def _fit_size(patcher, plans: list[LayerPlan], options: Int8Options) -> None:
    weights = {plan.name: pristine_weight(patcher, plan.name) for plan in plans}
    saved = {name: weight.nbytes - weight.numel() - 4 * weight.shape[0] for name, weight in weights.items()}  # values, fp32 scales
    size = patcher.model_size()
    try:
        fit_size(plans, saved, size - int(options.max_mb * 2**20), equivalent_layers(root_of(patcher), weights))
    except ValueError as error:
        raise ValueError(f"INT8 Quantize Model: {error} to get from {size / 2**20:.1f} to max_mb = {options.max_mb:g}. Raise max_mb, lower "
                         "min_sqnr_db, or keep fewer layers.") from None
