"""What a compile cache that outlives the process saves: the first image of a fresh ComfyUI, and of one that compiles in the background.

Every contender has servers and folders of its own. "cold" starts with empty caches, "restart" with what the cold run left (for core that
is torch's own cache), "stopped" with what a run left that ended 2 s after its first image; "compile" is what an image took beyond eager's
first one. The background run queues images until one ran compiled; pinned, with the server on one core and the builder on another (Linux).

    python benchmarks/restart_latency.py [--model tiny_flux | flux_57] [--size 256] [--steps 4] [--pinned] [--json FILE]
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import ComfyServer, find_comfyui, load_latent, relative_difference  # noqa: E402
from benchmarks.demo_report import cpu_name  # noqa: E402
from benchmarks.tiny_models import DEFAULT_NAMES, cache_dir, make_models  # noqa: E402
from benchmarks.workflows import flux_prompt  # noqa: E402

QUANTIZE = "INT8QuantizeModel", {"method": "convrot"}
CONTENDERS = {
    "eager": ([], 1),
    "core TorchCompileModel": ([("TorchCompileModel", {"backend": "inductor"})], 2),
    "Compile Model": ([("CompileModel", {})], 2),
    "INT8 eager": ([QUANTIZE], 1),
    "INT8 + Lazy": ([QUANTIZE, ("INT8LazyTorchCompile", {})], 2),
}
TWINS = {"core TorchCompileModel": "eager", "Compile Model": "eager", "INT8 + Lazy": "INT8 eager"}
BUILD_TIMEOUT = 900


class Bench:
    def __init__(self, options):
        self.options = options
        self.comfyui = find_comfyui()
        names = (*DEFAULT_NAMES, "flux_57") if options.model == "flux_57" else DEFAULT_NAMES
        self.models = make_models(self.comfyui, cache_dir(), names)

    @contextlib.contextmanager
    def server(self, folder: Path, threads: str = ""):
        env = {**({"OMP_NUM_THREADS": threads} if threads else {}),
               "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TMPDIR": str(folder), "INT8_COMPILE_CACHE": "1",
               "INT8_COMPILE_CACHE_DIR": str(folder / "cache"), "INT8_COMPILE_CACHE_KEY_FILE": str(folder / "key")}
        with (tempfile.TemporaryDirectory() as base,
              ComfyServer(comfyui=self.comfyui, models=self.models, base_dir=Path(base), env=env) as server):
            yield server

    def image(self, server, nodes: list, seed: int = 1):
        """(seconds, latent) of one prompt."""
        chain = [(node, {**server.defaults(node), **inputs}) for node, inputs in nodes]
        size = self.options.size
        result = server.run(flux_prompt(unet=f"{self.options.model}.safetensors", model_nodes=chain, width=size, height=size,
                                        steps=self.options.steps, seed=seed), timeout=1800)
        if result.status != "success" or "compile failed" in server.log_text():
            raise RuntimeError(f"{nodes}: {result.error}, see {server.log_path}")
        return result.seconds, load_latent(next(p for p in result.files(server) if p.suffix == ".latent"))

    def contender(self, nodes: list, starts: int):
        """(seconds of the first and second image of each start, the first image's latent)"""
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for start in ("cold", "restart")[:starts]:
                with self.server(Path(folder)) as server:
                    found[start], latent = self.image(server, nodes)
                    found[f"{start}, second image"], _ = self.image(server, nodes, seed=2)
                    server.wait_for_builder(BUILD_TIMEOUT)
        if starts > 1:
            with tempfile.TemporaryDirectory() as folder:
                with self.server(Path(folder)) as server:
                    self.image(server, nodes)
                    time.sleep(2)
                with self.server(Path(folder)) as server:
                    found["stopped"], _ = self.image(server, nodes)
        return found, latent

    def background(self, nodes: list):
        """(seconds, latent of a compiled image): images until one ran compiled."""
        found, images = {}, []
        nodes = [*nodes[:-1], (nodes[-1][0], {**nodes[-1][1], "background": True})]
        with tempfile.TemporaryDirectory() as folder, self.server(Path(folder), threads="1" if self.options.pinned else "") as server:
            if self.options.pinned:
                pin(server.process.pid, 0)
                threading.Thread(target=keep_builder_pinned, args=(server,), daemon=True).start()
            start = time.monotonic()
            while time.monotonic() - start < BUILD_TIMEOUT:
                seconds, _ = self.image(server, nodes, seed=1 + len(images))
                done = re.findall(r"step (\d+) on runs", server.log_text())
                images.append(seconds)
                if done:
                    found["compiled from step"] = int(done[-1])
                    found["ready after"] = time.monotonic() - start
                    break
            eager = images[1:-1] or images
            found |= {"first image": images[0], "eager image": statistics.median(eager), "slowest of them": max(eager),
                      "images until compiled": len(images)}
            found["compiled image"], latent = self.image(server, nodes)
        return found, latent

    def eager(self, nodes: list) -> dict:
        """The same without the builder."""
        with tempfile.TemporaryDirectory() as folder, self.server(Path(folder), threads="1" if self.options.pinned else "") as server:
            if self.options.pinned:
                pin(server.process.pid, 0)
            seconds = [self.image(server, nodes, seed=1 + index)[0] for index in range(8)]
        return {"eager's first image": seconds[0], "eager's image": statistics.median(seconds[1:])}


def pin(process: int, core: int):
    for thread in os.listdir(f"/proc/{process}/task"):
        os.sched_setaffinity(int(thread), {core})


def keep_builder_pinned(server: ComfyServer):
    """Keeps the server's builder and its compilers on the last core, while the server runs."""
    import psutil

    while server.process is not None:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, AttributeError):
            for child in psutil.Process(server.process.pid).children(recursive=True):
                child.cpu_affinity([os.cpu_count() - 1])
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny_flux", "flux_57"), default="tiny_flux")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--no-background", action="store_true")
    parser.add_argument("--pinned", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench, results, latents = Bench(options), {}, {}
    for name in options.only:
        results[name], latents[name] = bench.contender(*CONTENDERS[name])
        print(name, results[name], file=sys.stderr, flush=True)
    for name, twin in TWINS.items():
        if name in results and twin in results:
            for start in ("cold", "restart"):
                results[name][f"{start} compile"] = results[name][start] - results[twin]["cold"]
            results[name]["difference"] = relative_difference(latents[name], latents[twin])
            if not options.no_background and hasattr(os, "sched_setaffinity") and name != "core TorchCompileModel":
                results[f"{name}, background"], latent = bench.background(CONTENDERS[name][0])
                results[f"{name}, background"] |= bench.eager(CONTENDERS[twin][0])
                results[f"{name}, background"]["difference"] = relative_difference(latent, latents[twin])
    print(f"{options.model} {options.size}x{options.size}, {options.steps} steps, {cpu_name()}: seconds\n")
    for name, result in results.items():
        print(f"{name:28}" + ", ".join(f"{key} {value:.2g}" if key.startswith("diff") else f"{key} {value:.2f}"
                                       for key, value in result.items() if isinstance(value, (int, float))))
    if options.json:
        facts = {"date": datetime.date.today().isoformat(), "device": cpu_name(), "cores": os.cpu_count(), "model": options.model,
                 "size": options.size, "steps": options.steps}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
