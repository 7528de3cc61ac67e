"""Times of functions that compete, taken so that their ratios are fair."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

FLUSH = 2  # times the L2 cache's size that is written before each run
HEAD_START = 400_000  # cycles that the GPU waits while the CPU launches a run, at least: 0.2 ms
CYCLES = 2e9  # of a GPU in a second, about
WARM_UP = 3


def interleaved(functions: dict[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float) -> tuple[dict, dict]:
    """({name: {"median": seconds, "best": seconds}}, {name: why it cannot}). A round runs all in turn, each with a cold L2 cache; rounds
    end after that many, or when seconds are spent (at least two)."""
    failed, times = {}, {}
    for name, function in functions.items():
        try:
            for _ in range(WARM_UP):
                function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name] = []
        except Exception as error:  # a contender that cannot: the others go on
            failed[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    run = _cuda_seconds(device) if device.type == "cuda" else _cpu_seconds
    start, done = time.monotonic(), 0
    while times and done < rounds and (done < 2 or time.monotonic() - start < seconds):
        for name, taken in times.items():
            taken.append(run(functions[name]))
        done += 1
    return {name: {"median": statistics.median(taken), "best": min(taken)} for name, taken in times.items()}, failed


def _cpu_seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_seconds(device) -> Callable:
    flush = torch.empty(FLUSH * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    head_starts = {}

    def run(function) -> float:
        if function not in head_starts:
            begin = time.perf_counter()
            function()
            head_starts[function] = max(HEAD_START, int(3 * CYCLES * (time.perf_counter() - begin)))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(head_starts[function])
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    return run
