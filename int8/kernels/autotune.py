"""The int8 GEMM of a CUDA device, of all that can run there: our tiles, torch._int_mm and comfy_kitchen's, whichever measured fastest
for the shape."""
from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import reference, seen_right, tables, torch_mm
from .native import cache_folder
from .reference import Added
from .registry import KERNELS
from .tuning import Choices, NotNow, bucket, wall_seconds

logger = logging.getLogger(__name__)

# Gives a context in which what is measured leaves no trace where the program around keeps a record of allocations.
unrecorded: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
# What was chosen in this process, by device, shape and dtype: a lookup a call.
_CHOSEN: dict[tuple, Callable] = {}
# Whether what was chosen adds in its epilogue what it should, by key of _CHOSEN, what was chosen, and how rows share a gate.
_ADDS: dict[tuple, bool] = {}
# Tiles that are measured where no table ships, the ones predicted fastest: each takes Triton a second or two to compile. All of them are
# for benchmarks/gpu_suite.py.
TRIED = 5
# Seconds of an image that are spent on measuring: what no table knows runs as predicted until there is time, see Waiting.
BUDGET = 0.0
IDLE = 5.0  # seconds without a call, after which there is
RETRY = 60.0  # seconds until it is tried again where memory was short
NO_MEMORY = "there is not enough free memory"
CHOICE_RUNS = 7
FLUSH = 2  # times the L2 cache's size that is written between two runs: a layer finds neither its weight nor its input there
HEAD_START = 200_000  # cycles that the GPU waits before a run, while the CPU launches it, at least: 0.1 ms
CYCLES = 2e9  # of a GPU in a second, about


@functools.cache
def choices() -> Choices:
    return Choices(cache_folder() / "choices.json", tables.load(), BUDGET)


@functools.cache
def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def stack() -> str:
    """What decides, beside the card, which candidate is fast: Triton compiles ours, CUDA's library and the driver have torch._int_mm."""
    import triton  # optional; absent, ops does not come here

    toolkit = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"triton {triton.__version__}, {toolkit}, driver {driver_version()}"


def driver_version() -> int:
    """The CUDA version that NVIDIA's driver is for, its major part (13 for driver 580); 0 where there is none or it does not say. No torch
    from 2.8 to 2.15 tells it, so the driver itself is asked."""
    version = ctypes.c_int(0)
    try:
        driver = ctypes.WinDLL("nvcuda.dll") if os.name == "nt" else ctypes.CDLL("libcuda.so.1")
        driver.cuDriverGetVersion(ctypes.byref(version))  # needs no context; leaves 0 where it fails
    except (OSError, AttributeError):
        return 0
    return version.value // 1000


def shape_key(q: torch.Tensor, qweight: torch.Tensor, out_dtype: torch.dtype) -> str:
    return f"{out_dtype} | K {q.shape[1]} N {qweight.shape[0]} M {bucket(q.shape[0])}"


def candidates(q: torch.Tensor, qweight: torch.Tensor, tried: int | None = TRIED) -> dict[str, Callable]:
    """{name: int8_gemm} of what can run these operands, the one predicted fastest first. tried: how many tiles, None for all."""
    found: dict[str, Callable] = {}
    for kernel in KERNELS:
        if kernel.in_cuda_graphs or not is_captured(q):
            found |= kernel.candidates(q, qweight, tried)
    right = {name: call for name, call in found.items() if not seen_right.is_wrong(q.device, name)}
    return right or {reference.KERNEL.name: reference.int8_gemm}


def is_captured(q: torch.Tensor) -> bool:
    """Whether what runs on q now is recorded into a CUDA graph."""
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype, added: Added | None = None) -> torch.Tensor:
    """See reference.int8_gemm. All candidates give the same result, so a choice changes the time and nothing else. It is the same with what
    is added and without: chosen and looked at without."""
    m, k = q.shape
    waiting.last_call = time.monotonic()
    if not m:  # nothing to measure with
        return q.new_empty((0, qweight.shape[0]), dtype=out_dtype)
    key = (q.device, bucket(m), k, qweight.shape[0], out_dtype, bias is None)
    chosen = _CHOSEN.get(key) or _CHOSEN.get((*key, m))
    if chosen is not None and added is None:
        return chosen(q, s, qweight, weight_scale, bias, out_dtype)
    arguments = q, s, qweight, weight_scale, bias, out_dtype
    with unrecorded() if chosen is None else contextlib.nullcontext():
        chosen, y = (chosen, None) if chosen is not None else _choose_and_run(key, *arguments)
        if added is not None:
            return _add(key, chosen, arguments, added)
        return chosen(*arguments) if y is None else y


def _add(key: tuple, chosen: Callable, arguments: tuple, added: Added) -> torch.Tensor:
    """chosen's result with what is added: in its own epilogue, if that is right where it is first looked at, else after it."""
    known = key, chosen, seen_right.sharing(added.gate, arguments[0])
    if not _ADDS.get(known, True):
        return torch_mm.add(chosen(*arguments), added)
    y = chosen(*arguments, added=added)
    if known not in _ADDS:
        product = seen_right.Product((*arguments, added))
        what = seen_right.fault(f"{getattr(chosen, 'keywords', {}).get('config', '')} with what is added", y, lambda: product.error(y))
        if what is not None:
            _ADDS[known] = not what
        if what:
            return torch_mm.add(chosen(*arguments), added)
    return y


def _choose_and_run(key: tuple, q, s, qweight, weight_scale, bias, out_dtype) -> tuple[Callable, torch.Tensor | None]:
    """The first call with a shape: (what runs it, its result, which is None where that has not run)."""
    from . import triton_kernels

    # Once for all that is measured.
    arguments = (triton_kernels.dense(q), s, triton_kernels.dense(qweight), weight_scale, bias, out_dtype)
    m, k = q.shape
    full = tables.key(card(q.device), stack(), shape_key(q, qweight, out_dtype))
    known = choices().get(full)
    found = candidates(q, qweight, None if known else TRIED)
    if is_captured(q):  # nothing can be timed inside a CUDA graph
        return found.get(known, next(iter(found.values()))), None
    if known and known not in found:
        if triton_kernels.ships(known, q.device):  # it was measured for another number of rows of the bucket
            chosen, y = _launched(q.device, next(iter(found)), found, arguments)
            _CHOSEN[(*key, m)] = chosen
            return chosen, y
        found = candidates(q, qweight)
    chosen, y = _launched(q.device, choose(choices(), full, found, arguments), found, arguments)
    _CHOSEN[key] = chosen
    if choices().get(full) is None:
        waiting.add(full, Shape(q.device, m, k, qweight.shape[0], out_dtype, bias is not None))
    return chosen, y


class Shape(NamedTuple):
    """What a choice is for: y [m, n] = q [m, k] @ weight [n, k].T on device."""
    device: torch.device
    m: int
    k: int
    n: int
    out_dtype: torch.dtype
    bias: bool

    def forget(self) -> None:
        """Takes it out of _CHOSEN; with a bias or without, the choice is one."""
        for no_bias in (True, False):
            _CHOSEN.pop((self.device, bucket(self.m), self.k, self.n, self.out_dtype, no_bias), None)

    def arguments(self) -> tuple:
        """Random operands of int8_gemm."""
        q, w = (torch.randint(-127, 128, (rows, self.k), dtype=torch.int8, device=self.device) for rows in (self.m, self.n))
        s, scale = torch.rand(self.m, device=self.device), torch.rand(self.n, 1, device=self.device)
        return q, s, w, scale, torch.rand(self.n, device=self.device).to(self.out_dtype) if self.bias else None, self.out_dtype


class Waiting:
    """Shapes that run as predicted until nobody waits for an image: then a thread measures them, and what was measured runs from the next
    call on. busy: whether somebody waits for an image (prompts in ComfyUI's queue, see nodes/__init__.py); asked
    between two candidates. last_call: of int8_gemm, as time.monotonic gives it."""

    def __init__(self):
        self.busy: Callable[[], bool] = bool
        self.last_call = 0.0
        self._shapes: dict[str, Shape] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._shapes)

    def add(self, key: str, shape: Shape) -> None:
        """key: in choices()."""
        with self._lock:
            self._shapes[key] = shape
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="int8-compile tiles", daemon=True)
                self._thread.start()

    def measure(self, stop: Callable[[], bool] = bool, tick: Callable[[], object] = lambda: None) -> None:
        """All that waits, now; what could not be measured goes on waiting. stop: asked between two candidates. tick: called between two
        shapes; what it raises ends the measuring."""
        for key, shape in self._shapes.copy().items():
            tick()
            if stop():
                return
            self._measure(key, shape, stop)
            if choices().get(key) is not None:
                with self._lock:
                    self._shapes.pop(key, None)
                shape.forget()

    def _measure(self, key: str, shape: Shape, stop: Callable[[], bool]) -> None:
        timed = timer(shape.device)

        def seconds(call: Callable) -> float:
            if stop():
                raise NotNow("an image is made")
            return timed(call)
        try:
            arguments = shape.arguments()
            choose(choices(), key, candidates(arguments[0], arguments[2]), arguments, seconds, math.inf)
        except torch.cuda.OutOfMemoryError:
            logger.info("INT8: %s is measured later: %s.", key, NO_MEMORY)

    def _work(self):
        pause = IDLE
        while True:
            time.sleep(pause)
            with self._lock:
                if not self._shapes:
                    self._thread = None
                    return
            before, pause = len(self), IDLE
            if self._is_busy():
                continue
            try:
                self.measure(self._is_busy)
            except Exception as error:  # of a GPU that has failed: whoever uses it next is told
                logger.debug("INT8: measuring ended: %s: %s", type(error).__name__, error)
            pause = IDLE if len(self) < before else RETRY

    def _is_busy(self) -> bool:
        return self.busy() or time.monotonic() - self.last_call < IDLE


waiting = Waiting()


def _launched(device: torch.device, name: str, found: dict[str, Callable], arguments: tuple) -> tuple[Callable, torch.Tensor]:
    """(the first candidate that can be launched and is right, its result): the one named, else one after another as predicted. So what
    this driver or this Triton cannot run is found out here, and a user's layer runs all the same."""
    from . import triton_kernels

    product = seen_right.Product(arguments)
    for each, candidate in {name: found[name], **found, torch_mm.KERNEL.name: torch_mm.int8_gemm}.items():
        if seen_right.is_wrong(device, each):
            continue
        try:
            y = candidate(*arguments)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            config = getattr(candidate, "keywords", {}).get("config")
            if config is None:
                logger.debug("INT8: %s cannot run %s: %s", each, list(arguments[0].shape), error)
            else:
                triton_kernels.is_broken(device, config, error)
            continue
        if not seen_right.fault(each, arguments[0], functools.partial(product.error, y)):
            return candidate, y
    return reference.int8_gemm, reference.int8_gemm(*arguments)


def choose(choices: Choices, key: str, found: dict[str, Callable], arguments: tuple,
           seconds: Callable[[Callable], float] | None = None, budget: float | None = None) -> str:
    """The name of the fastest of found for arguments of int8_gemm, as choices know it, else measured with seconds(call). What is wrong is
    out."""
    calls = {name: functools.partial(candidate, *arguments) for name, candidate in found.items()}
    product = seen_right.Product(arguments)

    def once_looked_at(name: str, call: Callable):
        y = call()
        if name not in looked_at:
            if what := seen_right.fault(name, arguments[0], lambda: product.error(y)):
                raise seen_right.WrongResult(what)
            looked_at.add(name)
        return y
    looked_at: set[str] = set()
    calls = {name: functools.partial(once_looked_at, name, call) for name, call in calls.items()}
    return choices.choose(key, calls, seconds or timer(arguments[0].device), budget)


def timer(device: torch.device) -> Callable[[Callable], float]:
    """seconds(call) on device: the best run. On a GPU by its own clock, with nothing in its L2 cache, as a layer of a model finds it."""
    def seconds(call: Callable) -> float:
        try:
            return measured(call) if device.type == "cuda" else wall_seconds(call, lambda: None)
        except torch.cuda.OutOfMemoryError:
            raise NotNow(NO_MEMORY) from None

    def measured(call: Callable) -> float:
        with torch.cuda.device(device):
            flush = torch.empty(FLUSH * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
            call()  # compiles
            launched = time.perf_counter()
            call()
            # A slow CPU takes longer to launch a kernel than the GPU to run it, which is not the kernel's fault.
            head_start = max(HEAD_START, int(3 * CYCLES * (time.perf_counter() - launched)))
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CHOICE_RUNS)]
            for start, end in events:
                flush.zero_()
                torch.cuda._sleep(head_start)
                start.record()
                call()
                end.record()
            torch.cuda.synchronize(device)
        return min(start.elapsed_time(end) for start, end in events) / 1e3
    return seconds
