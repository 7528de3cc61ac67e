"""One Linear layer in every type and by every kernel that this machine has, over shapes of real models."""
from __future__ import annotations

import functools
import importlib.util
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...int8.kernels import autotune, ops, reference, torch_mm
from ...int8.quantize import quantize_weight

SIZES = ("quick", "full")
INT8 = "int8"  # begins the name of every INT8 contender; alone it is what the nodes run without rotation
ROTATED = "int8 rotated"
SECONDS = 0.8  # that the contenders of a shape are timed for, together, and at least MIN_ROUNDS
SAMPLE = 2e-3  # seconds of work between two readings of a GPU's clock: launching it is no part of a layer in a model
SLOW = 3.0  # times the fastest's time: timed no further
MAX_CALLS, MIN_ROUNDS, MAX_ROUNDS = 50, 4, 50
# A result that is farther from the baseline's is wrong; INT8 of Gaussian values is at 0.012 (38.4 dB), fp8 at 0.04.
MAX_ERROR = 0.15
FP8_MIN_CAPABILITY = (8, 9)
FP8_MAX = 448.0  # of float8_e4m3fn
# A processor needs minutes for a picture's tokens; this many show its ratios.
CPU_ROWS = {"quick": 256, "full": 512}
# Products of others take seconds to minutes a call on a processor without VNNI: seen by a few rows, and not run beyond so many seconds.
FEW_ROWS, SLOWEST = 8, 1.0


class Shape(NamedTuple):
    """A Linear, or a whole block, from k to n channels over m tokens, as model has it."""
    model: str
    m: int
    k: int
    n: int


# Flux at 1024x1024 has 4096 + 512 tokens, Wan at 832x480 32760 over 81 frames (a quarter of them here), SDXL 32x32 tokens with 1280
# channels and 64x64 with 640, times two for CFG.
QUICK = (Shape("Flux", 4608, 3072, 3072), Shape("Flux", 4608, 3072, 12288), Shape("Wan 14B", 8192, 5120, 5120),
         Shape("SDXL", 2048, 1280, 10240))
FULL = (*QUICK[:2], Shape("Flux", 512, 3072, 9216), Shape("Flux", 4608, 12288, 3072), Shape("Flux", 4608, 15360, 3072),
        QUICK[2], Shape("Wan 14B", 8192, 5120, 13824), Shape("Wan 14B", 8192, 13824, 5120),
        QUICK[3], Shape("SDXL", 2048, 1280, 1280), Shape("SDXL", 2048, 5120, 1280), Shape("SDXL", 8192, 640, 5120))
BLOCK = Shape("Flux", 4608, 3072, 3072)


class Sizes(NamedTuple):
    """What is measured: single layers, and one block, which is compiled too (None: no block)."""
    layers: list[Shape]
    block: Shape | None = None


def sizes(name: str, device: torch.device) -> Sizes:
    """quick: four layers. full: twelve, and a block as wide as Flux's. Raises ValueError for another name than those of SIZES."""
    if name not in SIZES:
        raise ValueError(f"Unknown size '{name}'. Choose one of: {', '.join(SIZES)}.")
    layers, block = (list(QUICK), None) if name == "quick" else (list(FULL), BLOCK)
    if device.type != "cpu":
        return Sizes(layers, block)
    layers = list(dict.fromkeys(shape._replace(m=min(shape.m, CPU_ROWS[name])) for shape in layers))
    return Sizes(layers, block and block._replace(m=CPU_ROWS["quick"]))


def sizes_of(width: int, tokens: int) -> Sizes:
    """A transformer block of this many channels over this many tokens, and its four layers. Raises ValueError for what cannot be one."""
    if width < 64 or width % 64 or tokens < 1:
        raise ValueError(f"No block is {width} wide over {tokens} tokens. Give a width that 64 divides, and at least one token.")
    name = f"width {width}"
    layers = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return Sizes([Shape(name, tokens, k, n) for k, n in layers], Shape(name, tokens, width, width))


@dataclass
class Row:
    """What a shape measured, in milliseconds a call. failed: contenders that cannot run here, or compute something else, and why."""
    model: str
    m: int
    k: int
    n: int
    milliseconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def winner(self) -> str:
        return min(self.milliseconds, key=self.milliseconds.get, default="")

    def ratios(self, baseline: str) -> dict[str, float]:
        """{contender: how many times as fast as baseline}"""
        base = self.milliseconds.get(baseline)
        return {name: base / ms for name, ms in self.milliseconds.items()} if base else {}


def float_dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """What device computes with natively, the usual one first; fp32 where nothing shorter is, and on CPUs, where ComfyUI computes in it."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip or capability >= (8, 0):
            return {"bf16": torch.bfloat16, "fp16": torch.float16}
        return {"fp16": torch.float16} if capability >= (7, 0) else {"fp32": torch.float32}
    if device.type != "cpu":
        return {"fp16": torch.float16}
    # Where they are not native torch converts to fp32 and back, and nobody wants them.
    found = {"bf16": torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {}
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        found["fp16"] = torch.float16
    return {**found, "fp32": torch.float32}


@torch.inference_mode()
def measure(device: torch.device, shapes: Iterable[Shape], dtypes: Mapping[str, torch.dtype],
            tick: Callable[[int], object] = lambda done: None) -> list[Row]:
    """A row for each shape. dtypes: the float contenders, the baseline first: INT8 layers take and give its type. tick(shapes done) is
    called between contenders; what it raises ends the measuring. On CUDA our INT8 GEMM measures its tiles on the way and keeps the choice
    on disk, where models find it; that spends nothing of the process's budget for it."""
    rows = []
    with autotune.choices().without_budget():
        for done, shape in enumerate(shapes):
            row = Row(*shape)
            time_in_turn(contenders(shape, device, dtypes), row, device, functools.partial(tick, done))
            rows.append(row)
    return rows


def contenders(shape: Shape, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> dict[str, Callable[[], torch.Tensor]]:
    """{name: the layer with its input bound -> y [M, N]}, the baseline first."""
    _, m, k, n = shape
    weight = torch.randn(n, k, device=device) / k ** 0.5
    bias = torch.randn(n, device=device)
    source = torch.randn(m, k, device=device)
    found: dict[str, Callable] = {name: _float(source, weight, bias, dtype) for name, dtype in dtypes.items()}
    first = next(iter(dtypes.values()))
    x, bias = source.to(first), bias.to(first)
    if has_fp8(device):
        found["fp8"] = _bind(fp8_linear(weight, bias), x)
    for rotated in (False, True):
        qweight, scale, group = quantize_weight(weight, rotated)
        if rotated and not group:
            continue
        end = " rotated" if rotated else ""
        found[INT8 + end] = _bind(ops.int8_linear, x, qweight, scale, bias, group)
        found[f"{INT8} torch._int_mm{end}"] = _unless_slow(_int_mm, x, qweight, scale, bias, group)
        for backend in kitchen_backends():
            found[f"{INT8} comfy_kitchen {backend}{end}"] = _unless_slow(kitchen_linear, x, backend, qweight, scale, bias, group)
    return found


def _bind(function: Callable, *arguments) -> Callable[[], torch.Tensor]:
    return lambda: function(*arguments)


def _float(x, weight, bias, dtype) -> Callable[[], torch.Tensor]:
    return _bind(F.linear, x.to(dtype), weight.to(dtype), bias.to(dtype))


def has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.version.hip or torch.cuda.get_device_capability(device) >= FP8_MIN_CAPABILITY)


def fp8_linear(weight: torch.Tensor, bias: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of weight [N, K] and bias [N] in x's type: x [M, K] -> [M, N], as ComfyUI multiplies in fp8: input clamped and cast, no scale."""
    one = torch.ones((), device=weight.device)
    weight = weight.to(torch.float8_e4m3fn).t()

    def linear(x):
        q = x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return torch._scaled_mm(q, weight, scale_a=one, scale_b=one, bias=bias, out_dtype=x.dtype)
    return linear


def _int_mm(x, qweight, scale, bias, group) -> torch.Tensor:
    q, s = reference.quant_rows(x, group)
    return torch_mm.int8_gemm(q, s, qweight, scale, bias, x.dtype)


def kitchen_backends() -> list[str]:
    """comfy_kitchen's that are there; the eager one, its last resort, only where it is alone."""
    if importlib.util.find_spec("comfy_kitchen") is None:
        return []
    import comfy_kitchen

    found = [name for name, state in comfy_kitchen.list_backends().items() if state["available"] and "int8_linear" in state["capabilities"]]
    return [name for name in found if name != "eager"] or found


class TooSlow(RuntimeError):
    """How many seconds a call would take."""


def kitchen_linear(x: torch.Tensor, backend: str, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor,
                   group: int) -> torch.Tensor:
    """ops.int8_linear by one of comfy_kitchen's backends."""
    import comfy_kitchen

    with comfy_kitchen.use_backend(backend):
        return comfy_kitchen.int8_linear(x, qweight, scale, bias, x.dtype, convrot=bool(group), convrot_groupsize=group)


def _unless_slow(function: Callable[..., torch.Tensor], x: torch.Tensor, *arguments) -> Callable[[], torch.Tensor]:
    """function of rows x, which on a CPU raises TooSlow at its first call where a few of them show that all would take too long."""
    tried = x.device.type != "cpu"

    def call():
        nonlocal tried
        if not tried:
            for _ in range(2):  # the first may load something
                start = time.perf_counter()
                function(x[:FEW_ROWS], *arguments)
            seconds = (time.perf_counter() - start) * len(x) / FEW_ROWS
            if seconds > SLOWEST:
                raise TooSlow(f"about {seconds:.0f} s a call")
            tried = True
        return function(x, *arguments)
    return call


def time_in_turn(functions: dict[str, Callable[[], torch.Tensor]], row: Row, device: torch.device, tick: Callable[[], object],
                 enough: float = SECONDS):
    """Into row: each one's best of many rounds, for enough seconds. A round runs all, in any order, so that other work on the machine
    meets all alike."""
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)

    def seconds(function, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter() - start) / calls
    expected, calls = None, {}
    for name, function in functions.items():
        tick()
        try:
            y = function().float()
            expected = y if expected is None else expected
            error = ((y - expected).norm() / expected.norm()).item()
            if not error < MAX_ERROR:
                raise ValueError(f"its result is off by {error:.0%}")
            calls[name] = 1 if device.type == "cpu" else min(MAX_CALLS, max(1, int(SAMPLE / seconds(function, 1))))
        except Exception as error:  # what cannot run here is a finding, not a failure of the check
            row.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    del expected
    best, spent, rounds = dict.fromkeys(calls, float("inf")), 0.0, 0
    while calls and rounds < MAX_ROUNDS and (rounds < MIN_ROUNDS or spent < enough):
        if rounds == MIN_ROUNDS // 2:  # the rest of the time is for the baseline and for those that may win
            limit = SLOW * min(best.values())
            calls = {name: count for name, count in calls.items() if name == next(iter(functions)) or best[name] < limit}
        for name in random.sample(list(calls), len(calls)):  # what ran before leaves its caches and clock rates
            tick()
            took = seconds(functions[name], calls[name])
            best[name], spent = min(best[name], took), spent + took * calls[name]
        rounds += 1
    row.milliseconds = {name: round(took * 1e3, 4) for name, took in best.items()}
