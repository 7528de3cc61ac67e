"""A pack for ComfyUI that measures: conditioning of any size without a text encoder, and the peak of memory over HTTP."""
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

    def run(self):
        while True:
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
    return web.json_response(MEMORY.read(reset="reset" in request.query))


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
