"""kill -9 of a whole ComfyUI server at random moments, while it writes compiled entries, bundles, INT8 files, its key and its library of
CPU kernels. After each, the next start must be right: its image is eager's, nothing damaged is to be seen, and what the killed one had
begun is gone.

    python benchmarks/kill_server.py [--kills 20] [--seconds 40] [--seed 0] [--work FOLDER]

Prints a line for each kill and the sums; exits with 1 when something was wrong. Linux and macOS.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import ComfyServer, find_comfyui, load_latent, relative_difference  # noqa: E402
from benchmarks.tiny_models import cache_dir, make_models  # noqa: E402
from benchmarks.workflows import flux_prompt  # noqa: E402

QUANTIZE = "INT8QuantizeModel", {"method": "rowwise"}
COMPILE = "INT8LazyTorchCompile", {"background": True}
SAVE = {"class_type": "SaveINT8Model", "inputs": {"filename_prefix": "int8", "model": ["model_1", 0]}}
NEAR = 0.03  # of eager's INT8 latent; the float model is 0.2 away, another seed more than 1
LEFT = (".int8-tmp-", ".bad-", ".lock-", ".bundle-", ".tmp", "tmp")  # how the names of what is being made begin
SEEDS = 1001, 1002
BUILD_SECONDS = 300


class Kills:
    def __init__(self, work: Path, generator: random.Random):
        self.work = work
        self.random = generator
        self.comfyui = find_comfyui()
        self.models = make_models(self.comfyui, cache_dir())
        self.cache, self.keys = work / "cache", work / "keys"
        self.was_writing: Counter = Counter()
        self.wrong: list[str] = []
        self.want: list = []  # of the images of SEEDS

    def server(self) -> ComfyServer:
        temporary = self.work / "tmp"
        temporary.mkdir(exist_ok=True)
        return ComfyServer(self.comfyui, self.work / "base", models=self.models, env={
            "INT8_COMPILE_CACHE": "1", "INT8_COMPILE_CACHE_DIR": str(self.cache), "TMPDIR": str(temporary),
            "INT8_COMPILE_CACHE_KEY_FILE": str(self.keys / "key")})

    def prompt(self, server: ComfyServer, nodes, seed: int) -> dict:
        return flux_prompt(model_nodes=[(node, {**server.defaults(node), **inputs}) for node, inputs in nodes], seed=seed, steps=2)

    def latent(self, server: ComfyServer, nodes, seed: int):
        prompt = self.prompt(server, nodes, seed)
        result = server.run(prompt, timeout=BUILD_SECONDS)
        if result.status != "success":
            raise RuntimeError(f"{result.error}")
        return load_latent(next(path for path in result.files(server) if path.suffix == ".latent"))

    def reference(self) -> None:
        with self.server() as server:
            self.want = [self.latent(server, [QUANTIZE], seed) for seed in SEEDS]

    def forget(self) -> None:
        """So that it is written again: any of the entries, the key, the kernels."""
        for path in (self.cache / "compiled" / "v1", self.cache / "native", self.keys / "key", self.work / "base" / "output"):
            if self.random.random() < 0.4:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def kill(self, seconds: float) -> str:
        """Starts a server that writes all it can, and kills it: -> what was half done."""
        server = self.server()
        thread = threading.Thread(target=self._write, args=(server,), daemon=True)
        thread.start()
        time.sleep(seconds)
        while server.process is None:
            time.sleep(0.01)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        half = Counter(next(begin for begin in LEFT if path.name.startswith(begin)) for path in self.left())
        thread.join(30)
        self.was_writing.update(half)
        return ", ".join(f"{count} {name}" for name, count in sorted(half.items())) or "nothing"

    def _write(self, server: ComfyServer) -> None:
        with contextlib.suppress(Exception), server:
            for seed in range(1000):
                prompt = self.prompt(server, [QUANTIZE, COMPILE], seed)
                prompt["bundle"] = {"class_type": "SaveCompileCache", "inputs": {"filename_prefix": "kill", "after": ["sampler", 0]}}
                prompt["file"] = SAVE
                server.run(prompt, timeout=BUILD_SECONDS)
                if seed % 3 == 2:
                    server.run({"clear": {"class_type": "ClearCompileCache", "inputs": {}}})

    def left(self) -> list[Path]:
        places = [path for path in self.work.rglob("*") if path.name.startswith(LEFT) and path not in (self.work / "tmp",)]
        return [path for path in places if path.relative_to(self.work).parts[:2] != ("cache", "inductor")
                and "custom_nodes" not in path.parts and path.parent.name not in ("base", "user")]

    def check(self) -> None:
        """The next start."""
        problems = []
        with self.server() as server:
            for seed, want in zip(SEEDS, self.want):  # the second by what was built for the first
                difference = relative_difference(self.latent(server, [QUANTIZE, COMPILE], seed), want)
                if difference > NEAR:
                    problems.append(f"the image of seed {seed} is {difference:.2g} from eager's")
                end = time.monotonic() + BUILD_SECONDS
                while server.log_text().count(" building: ") > server.log_text().count(" built: ") and time.monotonic() < end:
                    time.sleep(0.5)
            time.sleep(3)  # the builder ends
            log = server.log_text()
            problems += [f"left: {path.relative_to(self.work)}" for path in self.left()]
        problems += [line for line in log.splitlines() if any(text in line for text in (
            "damaged", "compile failed", "running uncompiled", "are not used, and built again", "Traceback"))]
        problems += self.damaged()
        if "runs DoubleStreamBlock" not in log:
            problems.append("it ran no compiled code")
        self.wrong += problems
        for problem in problems:
            print(f"    WRONG: {problem}", flush=True)

    def damaged(self) -> list[str]:
        """The visible files that are not whole."""
        from safetensors import safe_open

        problems = []
        store, read_bundle = self._store()
        for folder in store.own():
            try:
                store.whole(folder)
            except Exception as error:
                problems.append(f"{folder.name}: {error}")
        for path in (self.cache / "bundles").glob("*.zip"):
            try:
                read_bundle(path)
            except ValueError as error:
                problems.append(f"{path.name}: {error}")
        for path in (self.work / "base" / "output").rglob("*.safetensors"):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        file.get_tensor(name)
            except Exception as error:
                problems.append(f"{path.name}: {error}")
        return problems

    def _store(self):
        if "int8_pack" not in sys.modules:
            package = sys.modules["int8_pack"] = types.ModuleType("int8_pack")
            package.__path__ = [str(ROOT)]
        store, bundle = (importlib.import_module(f"int8_pack.compile.artifacts.{name}") for name in ("store", "bundle"))
        return store.CacheStore(self.cache / "compiled", self.keys / "key"), bundle.read_bundle


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=40, help="the last moment, from the server's start, at which it is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="an own folder; default: a fresh one, deleted at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills = Kills(options.work or Path(folder), random.Random(options.seed))
        kills.work.mkdir(parents=True, exist_ok=True)
        kills.reference()
        for number in range(1, options.kills + 1):
            kills.forget()
            seconds = kills.random.uniform(0, options.seconds)
            half = kills.kill(seconds)
            print(f"{number}: killed after {seconds:.1f} s, half done: {half}", flush=True)
            kills.check()
        print(json.dumps({"kills": options.kills, "half done": dict(kills.was_writing), "wrong": len(kills.wrong)}))
    sys.exit(bool(kills.wrong))


if __name__ == "__main__":
    main()
