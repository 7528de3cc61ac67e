"""A pack for ComfyUI that measures: conditioning of any size without a text encoder; over HTTP the peak of memory, and where the time of a
prompt goes: on the GPU by kernels, on the CPU by what its thread was found at."""
import collections
import sys
import threading
import time

import torch
from aiohttp import web
from server import PromptServer

INTERVAL = 0.02  # seconds


class Memory(threading.Thread):
    """The most memory in use since the last reset: of the whole GPU (weights that ComfyUI's dynamic VRAM holds are not torch's), else of
    this process."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.is_paused = False  # asking the driver takes its lock, which launches take too

    def run(self):
        while True:
            if not self.is_paused:
                self.peak = max(self.peak, self.used())
            time.sleep(INTERVAL)

    @staticmethod
    def used() -> int:
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            return total - free
        import psutil

        return psutil.Process().memory_info().rss

    def read(self, reset: bool) -> dict:
        cuda = torch.cuda.is_available()
        found = {"used_peak": self.peak, "used": self.used(), "torch_peak": torch.cuda.max_memory_allocated() if cuda else None,
                 "torch": torch.cuda.memory_allocated() if cuda else None}
        if reset:
            self.peak = 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        return found


MEMORY = Memory()
MEMORY.start()


@PromptServer.instance.routes.get("/gpu_probe")
async def gpu_probe(request):
    MEMORY.is_paused = "pause" in request.query
    return web.json_response(MEMORY.read(reset="reset" in request.query))


class Samples(threading.Thread):
    """What the thread that runs prompts is found at, every other millisecond."""

    def __init__(self):
        super().__init__(daemon=True)
        self.innermost, self.anywhere = collections.Counter(), collections.Counter()
        self.total, self.ended = 0, False

    def run(self):
        while not self.ended:
            for frame in sys._current_frames().values():
                stack = []
                while frame is not None:
                    stack.append((frame.f_code, frame.f_lineno))
                    frame = frame.f_back
                if any(code.co_name == "prompt_worker" for code, _ in stack):
                    self.total += 1
                    self.innermost.update(f"{_where(code)}:{line}" for code, line in stack[:1])
                    self.anywhere.update({_where(code) for code, _ in stack})
            time.sleep(0.002)


def _where(code) -> str:
    return "/".join(code.co_filename.split("/")[-3:]) + ":" + code.co_name


SAMPLES: list = []


@PromptServer.instance.routes.get("/gpu_profile")
async def gpu_profile(request):
    """start=1 begins; without it: {"wall": seconds, "busy": of the GPU, "kernels", "copies" of memory: [[name, seconds, count]],
    "innermost", "anywhere": [[place, share of the samples]]}."""
    if "start" in request.query:
        profiler = None
        if torch.cuda.is_available():
            profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            profiler.start()
        SAMPLES[:] = [profiler, Samples(), time.perf_counter()]
        SAMPLES[1].start()
        return web.json_response({})
    profiler, samples, start = SAMPLES
    found = {"wall": time.perf_counter() - start}
    samples.ended = True
    if profiler is not None:
        profiler.stop()
        events = [(e.key[:110], e.self_device_time_total / 1e6, e.count) for e in profiler.key_averages() if e.self_device_time_total]
        found |= {"busy": sum(seconds for _, seconds, _ in events), "kernels": sorted(events, key=lambda e: -e[1])[:30],
                  "copies": [event for event in events if event[0].startswith("Memcpy")]}
    for name, count in (("innermost", 25), ("anywhere", 70)):
        found[name] = [(place, n / max(1, samples.total)) for place, n in getattr(samples, name).most_common(count)]
    return web.json_response(found)


class BenchConditioning:
    """Random conditioning [1, tokens, width] and a pooled one, as a text encoder gives it."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {name: ("INT", {"default": default, "min": 0, "max": 1 << 20})
                 for name, default in (("tokens", 256), ("width", 4096), ("pooled", 2048), ("seed", 0))}
        return {"required": sizes}

    def make(self, tokens, width, pooled, seed):
        generator = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, tokens, width, generator=generator), {"pooled_output": torch.randn(1, pooled, generator=generator)}]],)


NODE_CLASS_MAPPINGS = {"BenchConditioning": BenchConditioning}
