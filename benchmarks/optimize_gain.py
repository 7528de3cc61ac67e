"""Whether Optimize Model tells the truth: a step without it and with it, in turns on one server, beside the gain that its node shows.

Each model is sampled until the node has decided and nothing is built any more. Then images without and with the node take turns, short
ones and long ones, of which a step is the difference; medians of all turns count. What is left uncompiled and without INT8 must not be
slower than without the node.

    python benchmarks/optimize_gain.py [--models NAME ...] [--goals NAME ...] [--turns 7] [--json FILE]
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import workflows  # noqa: E402
from benchmarks.comfy_server import ComfyServer, find_comfyui, load_latent, relative_difference  # noqa: E402
from benchmarks.demo_report import cpu_name  # noqa: E402
from benchmarks.tiny_models import cache_dir, make_models  # noqa: E402

MODELS = {
    "flux_narrow": (workflows.flux_prompt, dict(unet="flux_narrow.safetensors", width=128, height=128)),
    "flux": (workflows.flux_prompt, dict(width=256, height=256)),
    "wan": (workflows.wan_prompt, dict(width=128, height=128)),
    "sd15": (workflows.sd15_prompt, dict(width=128, height=128)),
    "zimage": (workflows.zimage_prompt, dict(width=64, height=64)),
}
GOALS = ("fastest", "balanced", "smallest", "exact")
SHORT, LONG = 2, 22  # steps
MOST_IMAGES = 400  # until it has decided
TIMEOUT = 900.0  # seconds


def optimized(report: dict | None) -> dict:
    """What Optimize Model tells in an image's history, {} for an image without."""
    return next((value["int8_compile"][0][-1]["details"] for value in (report or {}).values() if "int8_compile" in value), {})


class Bench:
    def __init__(self, server: ComfyServer, name: str, goal: str):
        self.server, self.goal = server, goal
        self.prompt, self.size = MODELS[name]

    def image(self, with_node: bool, steps: int, seed: int):
        """(seconds of the sampler and what follows it, what the node tells, latent)"""
        node = ("OptimizeModel", {**self.server.defaults("OptimizeModel"), "goal": self.goal})
        result = self.server.run(self.prompt(**self.size, steps=steps, seed=seed, model_nodes=[node] if with_node else []), TIMEOUT)
        if result.status != "success":
            raise RuntimeError(f"{result.error}, see {self.server.log_path}")
        return result.seconds, optimized(result.outputs), load_latent(next(p for p in result.files(self.server) if p.suffix == ".latent"))

    def decide(self) -> tuple[int, dict]:
        """(images until nothing more is decided or built, what the node tells then)"""
        for count in range(1, MOST_IMAGES):
            _, told, _ = self.image(True, LONG, 1000 + count)
            self.server.wait_for_builder(TIMEOUT)
            if told["optimize"]["compiled"] is not None:
                return count, self.image(True, LONG, 1000)[1]
        raise RuntimeError(f"Optimize Model has not decided after {MOST_IMAGES} images, see {self.server.log_path}")

    def turns(self, count: int) -> dict:
        seconds: dict = {(with_node, steps): [] for with_node in (False, True) for steps in (SHORT, LONG)}
        difference = 0.0
        for turn in range(count + 1):
            for steps in (SHORT, LONG):
                latents = []
                for with_node in (False, True):
                    taken, told, latent = self.image(with_node, steps, turn)
                    latents.append(latent)
                    if turn:  # the first loads what the node's model shares with the plain one
                        seconds[with_node, steps].append(taken)
                difference = max(difference, relative_difference(latents[1], latents[0]))
        step = {with_node: statistics.median(long - short for short, long in zip(seconds[with_node, SHORT], seconds[with_node, LONG]))
                / (LONG - SHORT) for with_node in (False, True)}
        return {"seconds_without": step[False], "seconds_with": step[True], "ratio": step[False] / step[True],
                "shown": (told.get("gain") or {}).get("ratio"), "difference": difference}


def line(row: dict) -> str:
    shown = "-" if row["shown"] is None else f"{row['shown']:.2f}"
    what = f"INT8 in {row['int8']} layers, {'compiled' if row['compiled'] else 'uncompiled'}"
    return (f"{row['model']:<14}{row['goal']:<10}{row['images']:>7}{row['seconds_without']:>10.4f}{row['seconds_with']:>10.4f}"
            f"{row['ratio']:>8.2f}{shown:>8}{row['difference']:>12.1e}  {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--goals", nargs="*", choices=GOALS, default=["balanced", "exact"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    comfyui = find_comfyui()
    models = make_models(comfyui, cache_dir(), ("clip", *options.models))
    rows = []
    print(f"{cpu_name()}, {os.cpu_count()} cores; seconds a step\n")
    print(f"{'model':<14}{'goal':<10}{'images':>7}{'without':>10}{'with':>10}{'ratio':>8}{'shown':>8}{'difference':>12}  what it does")
    for name in options.models:
        for goal in options.goals:
            with tempfile.TemporaryDirectory() as folder, ComfyServer(
                    base_dir=Path(folder), comfyui=comfyui, models=models,
                    env={"INT8_COMPILE_CACHE_DIR": f"{folder}/cache", "INT8_COMPILE_CACHE_KEY_FILE": f"{folder}/key/cache.key",
                         "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}) as server:
                bench = Bench(server, name, goal)
                images, told = bench.decide()
                row = {"model": name, "goal": goal, "images": images, **bench.turns(options.turns),
                       "int8": told["optimize"]["int8_layers"], "compiled": told["optimize"]["compiled"]}
            rows.append(row)
            print(line(row), flush=True)
    if options.json:
        facts = {"date": datetime.date.today().isoformat(), "device": cpu_name(), "cores": os.cpu_count(), "steps": [SHORT, LONG],
                 "turns": options.turns}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
