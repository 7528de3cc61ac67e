"""Many mixed prompts on one ComfyUI server: Flux, Wan and SD1.5; LoRAs, sizes, batches, CFG, prompt lengths; INT8 methods on and off; nodes
removed and put back; two models in one prompt; interrupts and /free. Each latent is compared with that of the same prompt without the
compile node.

    python benchmarks/soak.py 500 [--seed 0] [--backend aot_eager] [--dtype bf16] [--families flux wan] [--json FILE] [--work FOLDER]
    python benchmarks/soak.py 500 --seed 0 --eager   the same prompts without this pack's nodes: what ComfyUI's own memory does

Counts what was wrong, failed, compiled again although its kind had been compiled, or taken for wrong by the checks against eager and of the
kernels (false alarms), and what memory, threads and descriptors the server had after the first prompts and at the end; exits with 1 when
one of the first four is not zero. A report counts by torch's own counters. Linux and macOS. Interrupts and /free come besides the prompts.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import ComfyServer, RunResult, find_comfyui, load_latent, relative_difference  # noqa: E402
from benchmarks.demo_report import cpu_name  # noqa: E402
from benchmarks.tiny_models import DEFAULT_NAMES, cache_dir, make_models  # noqa: E402
from benchmarks.workflows import flux_prompt, reports, sampled_again, sd15_prompt, wan_prompt, zimage_prompt  # noqa: E402

WARM_UP = 25  # prompts
SAME = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}  # relative difference to eager
# Inductor's code differs from eager in the last bits. In INT8 a rounding then goes the other way, and later ones with it: like a LoRA at a
# strength of 1.000001, it changes up to 0.8 of the INT8 noise, of which half is shared. Other weights share nothing with eager's image but
# the float image: a float model is as far from it as INT8 is from float, another INT8 model 1.4 times that. Where less of the noise is
# shared (Z-Image: eager itself moves by 1.0 to 1.1 of it), eager with a LoRA that much stronger is the yardstick.
NEARER_THAN_FLOAT = 0.95
TINY, OF_TINY = 1e-6, 1.2
UNET_DTYPE: dict[str, list[str]] = {"fp32": [], "fp16": ["--fp16-unet"], "bf16": ["--bf16-unet"]}
ATTENTION = ["--use-pytorch-cross-attention"]
TIMEOUT = 900  # seconds
ALARM, KERNEL_ALARM = "computes something else than the model", "computes wrong results"
LONG = 200  # steps of what is interrupted
FAMILIES = "flux", "flux", "wan", "sd15"
PROMPTS = {"flux": flux_prompt, "wan": wan_prompt, "sd15": sd15_prompt, "zimage": zimage_prompt}
SIZES = {"flux": ((64, 64), (128, 64), (128, 192)), "wan": ((64, 64), (64, 96)), "sd15": ((64, 64), (64, 128)),
         "zimage": ((64, 64), (128, 64))}
LORAS = {"flux": ("tiny_flux_a", "tiny_flux_b"), "wan": ("tiny_wan_a",), "sd15": ("tiny_sd15_a",), "zimage": ("tiny_zimage_a",)}
TEXTS = "a red fox", "a blue bird in a tree, " * 12
METHODS = None, "rowwise", "convrot", "smoothquant", "auto"
# Their plans are made at a model's first sampling.
MEASURED = "smoothquant", "auto"


@dataclass(frozen=True)
class Case:
    """One image. compile: a compile node with background on or off, None for none."""

    family: str
    size: tuple[int, int]
    batch: int
    cfg: float
    steps: int
    text: str
    lora: tuple[str, float] | None
    method: str | None
    compile: tuple[str, bool] | None

    @classmethod
    def draw(cls, rng: random.Random, families: Sequence[str]) -> Case:
        family = rng.choice(families)
        lora = rng.choice((None, *LORAS[family]))
        return cls(family, rng.choice(SIZES[family]), rng.choice((1, 1, 2, 3)), rng.choice((1.0, 3.0)), rng.choice((2, 3)),
                   rng.choice(TEXTS), lora and (f"{lora}.safetensors", rng.choice((0.5, 1.0))), rng.choice(METHODS),
                   rng.choice((None, ("CompileModel", False), ("INT8LazyTorchCompile", False), ("INT8LazyTorchCompile", True))))

    @property
    def code(self) -> tuple:
        """What shares a report."""
        return self.family, self.compile

    @property
    def kind(self) -> tuple:
        """What is compiled once: neither size nor text, LoRA, steps; a batch other than 1 is of another kind."""
        # ComfyUI samples the empty prompt of CFG in the same batch; of Flux and Wan only if both prompts have as many tokens.
        together = self.cfg != 1 and (self.family not in ("flux", "wan") or self.text == TEXTS[0])
        return *self.code, self.method, self.batch * (1 + together) > 1


class Soak:
    def __init__(self, server: ComfyServer, rng: random.Random, backend: str, families: Sequence[str], same: float, eager: bool = False):
        """same: the relative difference to eager that a right image may have. eager: no node of this pack."""
        self.server = server
        self.rng = rng
        self.backend = backend
        self.families = families
        self.same = same
        self.only_eager = eager
        self.process = psutil.Process(server.process.pid)
        self.lives: Counter = Counter()  # of the families' models: ComfyUI drops and loads them
        self.eager: dict[tuple, object] = {}  # latents
        self.alarms: set[str] = set()
        self.checks: dict[tuple, int] = {}  # against eager, by life and Case.code
        self.graphs: dict[tuple, int] = {}  # by life and Case.code
        self.kinds: set[tuple] = set()  # that were sampled
        self.counts: Counter = Counter()
        self.calls: Counter = Counter()  # of blocks in last steps, by what ran them
        self.problems: list[dict] = []
        self.differences: list[float] = []
        self.of_noise: list[float] = []  # of INT8: difference to eager, in units of that to float
        self.of_tiny: list[float] = []  # in units of what a tiny change does to eager
        self.resources: list[dict] = []

    def draw(self) -> Case:
        case = Case.draw(self.rng, self.families)
        return replace(case, method=None, compile=None) if self.only_eager else case

    def prompt(self, case: Case, compiled: bool, steps: int | None = None) -> dict:
        nodes = []
        if case.method:
            nodes.append(("INT8QuantizeModel", {**self.server.defaults("INT8QuantizeModel"), "method": case.method}))
        if compiled and case.compile:
            node, background = case.compile
            chosen = {"backend": self.backend} if node == "CompileModel" else {}
            nodes.append((node, {**self.server.defaults(node), **chosen, "background": background}))
        width, height = case.size
        prompt = PROMPTS[case.family](width=width, height=height, batch=case.batch, cfg=case.cfg, steps=steps or case.steps,
                                      text=case.text, lora=case.lora, model_nodes=nodes)
        self.counts["sampled"] += 1
        return sampled_again(prompt, self.counts["sampled"])

    def reference(self, case: Case):
        """The latent without the compile node; None where it failed."""
        case = replace(case, compile=None)
        prompt = self.prompt(case, compiled=False)
        while (key := (case, self.lives[case.family] if case.method in MEASURED else 0)) not in self.eager:
            latent = self.latents(self.run(prompt, case))[0]  # may begin another life
            self.eager[case, self.lives[case.family] if case.method in MEASURED else 0] = latent
        return self.eager[key]

    def run(self, prompt: dict, *cases: Case) -> RunResult | None:
        try:
            result = self.server.run(prompt, timeout=TIMEOUT)
        except (OSError, RuntimeError, TimeoutError) as error:
            self.problem("failed", cases, str(error))
            raise
        self.look_at_loaders(prompt, result)
        if result.status != "success":
            self.problem("failed", cases, str(result.error or result.status))
            return None
        return result

    def look_at_loaders(self, prompt: dict, result: RunResult) -> None:
        cached = result.cached_nodes
        loaded = {prompt[node]["inputs"]["unet_name"] for node in prompt if node.endswith("unet") and node not in cached}
        self.lives.update(family for family in PROMPTS if f"tiny_{family}.safetensors" in loaded)

    def latents(self, result: RunResult | None) -> list:
        """Those of a prompt's samplers, in the order of their names."""
        if result is None:
            return [None, None]
        return [load_latent(path) for path in sorted(result.files(self.server)) if path.suffix == ".latent"]

    def problem(self, what: str, cases, detail: str):
        self.counts[what] += 1
        self.problems.append({"what": what, "prompt": self.counts["prompts"], "cases": list(map(asdict, cases)),
                              "detail": detail})
        print(f"  {what.upper()} at prompt {self.counts['prompts']}: {cases}: {detail}", flush=True)

    def one(self, case: Case) -> None:
        if self.rng.random() < 0.5:
            self.reference(case)
        result = self.run(self.prompt(case, compiled=True), case)
        self.compare(case, self.latents(result)[0])
        if result is not None:
            self.look_at_report(case, result.outputs)

    def two(self, first: Case, second: Case) -> None:
        """Two models in one prompt. ComfyUI may drop either before its eager prompt, and what was measured of it is lost then."""
        first, second = (replace(case, method="convrot") if case.method in MEASURED else case for case in (first, second))
        result = self.run({**_renamed(self.prompt(first, compiled=True), "a"), **_renamed(self.prompt(second, compiled=True), "b")},
                          first, second)
        for case, latent in zip((first, second), self.latents(result)):
            self.compare(case, latent)
        if result is not None:
            for name, case in (("a", first), ("b", second)):
                self.look_at_report(case, {node: output for node, output in result.outputs.items() if node.startswith(f"{name}_")})

    def compare(self, case: Case, latent) -> None:
        want = self.reference(case)
        if latent is None or want is None:
            return
        difference, bound = relative_difference(latent, want), self.same
        if case.method and case.compile and not (self.backend == "aot_eager" and case.compile[0] == "CompileModel"):
            from_float = relative_difference(latent, self.reference(replace(case, method=None)))
            bound = NEARER_THAN_FLOAT * from_float
            self.of_noise.append(difference / from_float)
            if not difference < bound:
                name, strength = case.lora or (f"{LORAS[case.family][0]}.safetensors", 0.0)
                moved = relative_difference(self.reference(replace(case, lora=(name, strength + TINY))), want)
                self.of_tiny.append(difference / moved)
                bound = max(bound, OF_TINY * moved)
        else:
            self.differences.append(difference)
        if not difference < bound:
            self.problem("wrong", [case], f"{difference:.2g} from eager, more than {bound:.2g}")

    def look_at_report(self, case: Case, outputs: dict) -> None:
        if case.compile is None:
            return
        details = reports(outputs)[-1]["details"]
        self.calls.update(details["last_calls"])
        if details["failure"]:
            self.problem("failed", [case], details["failure"])
        for text in details["fallbacks"]:
            if ALARM in text and text not in self.alarms:
                self.alarms.add(text)
                self.problem("false alarms", [case], text)
        self.checks[(self.lives[case.family], *case.code)] = details["checks"]
        life = self.lives[case.family]
        code, kind = (life, *case.code), (life, *case.kind)
        new = details["graphs"] - self.graphs.get(code, 0)
        if new > 0 and kind in self.kinds:
            where = "recompiled" if self.counts["prompts"] > WARM_UP else "recompiled in warm-up"
            self.problem(where, [case], f"{new} graphs: {details['recompiles'][-new:]}")
        self.graphs[code] = details["graphs"]
        self.kinds.add(kind)

    def interrupt(self, case: Case) -> None:
        prompt = self.prompt(case, compiled=True, steps=LONG)
        queued = self.server.queue(prompt)
        time.sleep(self.rng.uniform(0, 3))
        self.server.interrupt()
        result = self.server.wait(queued, TIMEOUT)
        status = result.status
        self.look_at_loaders(prompt, result)
        self.counts[f"interrupts: {status}"] += 1
        if status not in ("interrupted", "success"):
            self.problem("failed", [case], f"{status} after an interrupt")
        if case.compile:
            self.kinds.discard((self.lives[case.family], *case.kind))  # which may have to be compiled yet

    def free(self) -> None:
        self.server.free()
        self.counts["frees"] += 1

    def measure(self) -> dict:
        with self.process.oneshot():
            return {"rss_mb": round(self.process.memory_info().rss / 2**20), "threads": self.process.num_threads(),
                    "descriptors": self.process.num_fds(), "children": len(self.process.children())}

    def soak(self, prompts: int) -> None:
        while self.counts["prompts"] < prompts:
            self.counts["prompts"] += 1
            case = self.draw()
            start = time.monotonic()
            chance = self.rng.random()
            if chance < 0.1:
                other = self.draw()
                while other.family == case.family:
                    other = self.draw()
                self.two(case, other)
            else:
                if chance < 0.2:
                    self.interrupt(self.draw())
                if chance > 0.95:
                    self.free()
                self.one(case)
            self.resources.append(self.measure())
            print(f"{self.counts['prompts']}: {time.monotonic() - start:.1f} s, {case.family}, {case.method}, {case.compile}, "
                  f"{self.resources[-1]}", flush=True)

    def summary(self) -> dict:
        log = self.server.log_text()
        counted = {name: self.counts[name] for name in ("prompts", "sampled", "wrong", "failed", "recompiled", "recompiled in warm-up",
                                                        "false alarms", "frees")}
        counted |= {name: count for name, count in self.counts.items() if name.startswith("interrupts")}
        counted["failed"] += log.count("compile failed")
        counted["false alarms"] += log.count(KERNEL_ALARM)
        counted["checks against eager"] = sum(self.checks.values())
        return {**counted, "tracebacks in the log": log.count("Traceback"), "largest difference": max(self.differences, default=0.0),
                "median difference": statistics.median(self.differences or [0.0]), "kinds": len(self.kinds),
                "largest difference in INT8, of its noise": max(self.of_noise, default=0.0),
                "of a tiny change, where it was compared with that": self.of_tiny, "loads": dict(self.lives),
                "block calls in last steps": dict(self.calls),
                "after warm-up": self.resources[min(WARM_UP, len(self.resources)) - 1], "at the end": self.resources[-1]}


def _renamed(prompt: dict, name: str) -> dict:
    """The same prompt with "name_" in front of all ids, and of what it saves."""
    renamed = {}
    for node, content in prompt.items():
        inputs = {key: [f"{name}_{value[0]}", value[1]] if isinstance(value, list) else value for key, value in content["inputs"].items()}
        if "filename_prefix" in inputs:
            inputs["filename_prefix"] = f"{name}_{inputs['filename_prefix']}"
        renamed[f"{name}_{node}"] = {**content, "inputs": inputs}
    return renamed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("prompts", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="inductor", help="of Compile Model; the other compile node always has inductor")
    parser.add_argument("--dtype", choices=SAME, default="fp32", help="that models compute in")
    parser.add_argument("--families", nargs="+", choices=PROMPTS, default=FAMILIES, help="one that is named twice comes twice as often")
    parser.add_argument("--pytorch-attention", action="store_true", help="the attention that ComfyUI uses on GPUs, not a CPU's default")
    parser.add_argument("--eager", action="store_true", help="no node of this pack")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="the server's folder; default: a fresh one, deleted at the end")
    options = parser.parse_args()
    comfyui = find_comfyui()
    models = make_models(comfyui, cache_dir(), (*DEFAULT_NAMES, *({"sd15", "zimage"} & {*options.families})))
    with contextlib.ExitStack() as scope:
        work = options.work or Path(scope.enter_context(tempfile.TemporaryDirectory()))
        env = {"INT8_COMPILE_CACHE": "1", "INT8_COMPILE_CACHE_DIR": str(work / "cache"),
               "INT8_COMPILE_CACHE_KEY_FILE": str(work / "keys" / "key")}
        server = scope.enter_context(ComfyServer(comfyui, work / "base", models=models, env=env,
                                                 extra_args=[*ATTENTION * options.pytorch_attention, *UNET_DTYPE[options.dtype]]))
        soak = Soak(server, random.Random(options.seed), options.backend, options.families, SAME[options.dtype], options.eager)
        start = time.monotonic()
        try:
            soak.soak(options.prompts)
        finally:
            facts = {"date": datetime.date.today().isoformat(), "device": cpu_name(), "comfyui": server.comfyui_version,
                     "seed": options.seed, "backend": options.backend, "dtype": options.dtype, "families": options.families,
                     "eager": options.eager,
                     "attention": "pytorch" if options.pytorch_attention else "default", "seconds": round(time.monotonic() - start)}
            summary = soak.summary()
            print(json.dumps({**facts, **summary}, indent=2), flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps({**facts, **summary, "problems": soak.problems, "resources": soak.resources},
                                                   indent=1) + "\n")
    sys.exit(any(summary[name] for name in ("wrong", "failed", "recompiled", "false alarms")))


if __name__ == "__main__":
    main()
