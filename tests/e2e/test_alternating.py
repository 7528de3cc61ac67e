"""Models that take turns in one server: whatever was there before, each image is its own, and what has been compiled stays compiled.

INT8_COMPILE_ORDERS: how many random orders. From 48 on some are of Z-Image, which is not small.
INT8_COMPILE_ORDERS_SEED: of which seed.
INT8_COMPILE_ORDERS_BACKEND: inductor, to have code generated and kept for every model; by default only for some, for time's sake.
"""
from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass

import pytest
from toys import difference

from benchmarks.comfy_server import ComfyServer, find_comfyui
from benchmarks.tiny_models import cache_dir, make_models
from benchmarks.workflows import flux_prompt, reports, sampled_again, sd15_prompt, wan_prompt, zimage_prompt

from .conftest import latent

pytestmark = [pytest.mark.e2e, pytest.mark.rotating(3)]
ORDERS = int(os.environ.get("INT8_COMPILE_ORDERS", "8"))
SEED = int(os.environ.get("INT8_COMPILE_ORDERS_SEED", "0"))
BACKEND = os.environ.get("INT8_COMPILE_ORDERS_BACKEND", "aot_eager")
WITH_ZIMAGE = ORDERS >= 48
SAME = 1e-3
# Inductor's code differs from eager in the last bits. In INT8 a rounding then goes the other way, and later ones with it: like a LoRA at a
# strength of 1.000001, it changes up to 0.8 of the INT8 noise, of which half is shared. Other weights share nothing with eager's image but
# the float image: a float model is as far from it as INT8 is from float, another INT8 model 1.4 times that.
NEARER_THAN_FLOAT = 0.95
BUILD_SECONDS = 600

# Steps: of a first sampling smoothquant and auto look at three.
FAMILIES = {
    "flux": lambda **inputs: flux_prompt(width=64, height=64, steps=2, **inputs),
    "wan": lambda **inputs: wan_prompt(steps=2, cfg=2.0, **inputs),
    "sd15": lambda **inputs: sd15_prompt(width=64, height=64, steps=2, **inputs),
    "zimage": zimage_prompt,
}
LAST_BLOCKS = {"flux": "single_blocks.*", "wan": "blocks.3.*", "sd15": "output_blocks.*", "zimage": "layers.*"}
COMPILES = "CompileModel", "INT8LazyTorchCompile"


@dataclass(frozen=True, eq=False)
class Model:
    """A family's model, with a LoRA or not, and what is done to it. quantize: inputs of INT8 Quantize Model. compile: a compile node and
    inputs of it. modes: of Apply Modes."""

    family: str
    name: str
    quantize: dict | None = None
    compile: tuple[str, dict] | None = None
    modes: list | None = None
    lora: float = 0.0

    @property
    def is_compiled(self) -> bool:
        return self.compile is not None or any(_name(mode) == "compile" for mode in self.modes or ())

    @property
    def in_background(self) -> bool:
        return self.compile is not None and self.compile[1].get("background", False)

    @property
    def is_exact(self) -> bool:
        """Whether it computes as eager does, to the last bits, but for float32's."""
        in_int8 = self.quantize is not None or any(_name(mode) == "int8" for mode in self.modes or ())
        return not (in_int8 and self.is_compiled) or (BACKEND == "aot_eager" and (self.modes or self.compile[0] == "CompileModel"))

    @property
    def eager(self) -> str:
        """Which image it is to make: that of the same inputs without compile."""
        modes = [mode for mode in self.modes or () if _name(mode) != "compile"]
        return json.dumps([self.family, self.quantize, modes, self.lora])

    @property
    def code(self) -> str:
        """Models of one code share a report."""
        return json.dumps([self.family, self.compile, bool(self.modes)])

    def nodes(self, defaults, compiled: bool) -> list:
        nodes = [defaults("INT8QuantizeModel", **self.quantize)] if self.quantize is not None else []
        if self.modes is not None:
            nodes.append(("ApplyModes", {"modes": json.dumps([mode for mode in self.modes if compiled or _name(mode) != "compile"])}))
        if compiled and self.compile is not None:
            nodes.append(defaults(self.compile[0], **self.compile[1]))
        return nodes

    def prompt(self, defaults, compiled: bool = True) -> dict:
        lora = (f"tiny_{self.family}_a.safetensors", self.lora) if self.lora else None
        return FAMILIES[self.family](lora=lora, model_nodes=self.nodes(defaults, compiled))


def _name(mode) -> str:
    return mode if isinstance(mode, str) else mode["name"]


def models(family: str, lazy: dict | None = None) -> list[Model]:
    """lazy: further inputs of INT8 Lazy Torch Compile, which always generates code."""
    compiled = "CompileModel", {"backend": BACKEND}
    mode = {"name": "compile", "config": {"backend": BACKEND}}
    found = [
        Model(family, "untouched"),
        Model(family, "untouched with a LoRA", lora=0.7),
        Model(family, "compiled", compile=compiled),
        Model(family, "compiled with a LoRA", compile=compiled, lora=0.7),
        Model(family, "rowwise", {"method": "rowwise"}),
        Model(family, "rowwise compiled", {"method": "rowwise"}, compiled),
        Model(family, "convrot compiled with a LoRA", {"method": "convrot"}, compiled, lora=0.7),
        Model(family, "convrot but some layers", {"method": "convrot", "keep_layers": LAST_BLOCKS[family]}, compiled),
        Model(family, "smoothquant compiled", {"method": "smoothquant"}, compiled),
        Model(family, "auto compiled", {"method": "auto"}, compiled),
        Model(family, "modes: compile", modes=[mode]),
        Model(family, "modes: int8", modes=["int8"]),
        Model(family, "modes: int8, compile", modes=["int8", mode]),
        Model(family, "modes: convrot, int8, compile", modes=["convrot", "int8", mode]),
        Model(family, "modes: smoothquant, int8, compile", modes=["smoothquant", "int8", mode]),
    ]
    if lazy is not None:
        lazily = "INT8LazyTorchCompile", lazy
        found += [
            Model(family, f"lazily {lazy}", compile=lazily),
            Model(family, f"rowwise lazily {lazy}", {"method": "rowwise"}, lazily),
            Model(family, f"rowwise lazily {lazy} with a LoRA", {"method": "rowwise"}, lazily, lora=0.7),
        ]
    return found


class Turns:
    """Samples models in turn in one server and looks at each image and report."""

    def __init__(self, server: ComfyServer):
        self.server = server
        self.images: dict[str, object] = {}  # eager ones
        self.graphs: dict[str, int] = {}  # by Model.code, of those that ComfyUI has loaded
        self.seen: set[Model] = set()
        self.wrong: list[str] = []
        self.number = 0

    def defaults(self, node_id: str, **inputs):
        return node_id, {**self.server.defaults(node_id), **inputs}

    def sample(self, model: Model, compiled: bool):
        self.number += 1
        result = self.server.run(sampled_again(model.prompt(self.defaults, compiled), self.number))
        if "unet" not in result.cached_nodes:  # another family's prompt took its place: it was loaded anew
            for known in [known for known in self.seen if known.family == model.family]:
                self.seen.remove(known)
                self.graphs.pop(known.code, None)
        return latent(self.server, result), result

    def eager(self, model: Model):
        if model.eager not in self.images:
            self.images[model.eager], _ = self.sample(model, compiled=False)
        return self.images[model.eager]

    def take(self, model: Model, built: bool = False) -> dict:
        """Samples model and returns the last step's calls of blocks. built: what is compiled in the background has been."""
        want = self.eager(model)
        image, result = self.sample(model, compiled=True)
        off, bound = difference(image, want), SAME
        if not model.is_exact:
            bound = NEARER_THAN_FLOAT * difference(image, self.eager(Model(model.family, "untouched", lora=model.lora)))
        if not off < bound:
            self.wrong.append(f"{model.family}, {model.name}: {off:.1e} from its eager image, more than {bound:.1e}")
        calls: dict = {}
        if model.is_compiled:
            report = reports(result.outputs)[-1]
            details = report["details"]
            calls = details["last_calls"]
            is_served = calls.get("eager") == 0 and sum(calls.values()) > 0
            if details["failure"] or (model in self.seen and not is_served and (built or not model.in_background)):
                self.wrong.append(f"{model.family}, {model.name}: not served: {calls}, {report['status']}, {report['warnings']}")
            if model in self.seen and details["graphs"] > self.graphs[model.code]:
                self.wrong.append(f"{model.family}, {model.name}: compiled again: {details['recompiles'][-2:]}")
            self.graphs[model.code] = details["graphs"]
        self.seen.add(model)
        return calls

    def alternate(self, pool: list[Model], orders: int, rng: random.Random, built: bool = False) -> list[dict]:
        """A/B/A/B, A/B/B/A and the like of two or three models of pool, of one family or of two; the calls of each."""
        calls = []
        for _ in range(orders):
            first = rng.choice(pool)
            others = [model for model in pool if model.family == first.family] if rng.random() < 0.7 else pool
            chosen = [first, *rng.sample([model for model in others if model is not first], rng.choice((1, 1, 2)))]
            order = [*chosen, *chosen]
            if rng.random() < 0.5:
                rng.shuffle(order)
            before = len(self.wrong)
            calls += [self.take(model, built) for model in order]
            for n in range(before, len(self.wrong)):
                self.wrong[n] += f", in {[model.name for model in order]}"
        return calls

    def wait_for_builder(self):
        end = time.monotonic() + BUILD_SECONDS
        while (log := self.server.log_text()).count(": building: ") > log.count(": built: ") and time.monotonic() < end:
            assert "running uncompiled" not in log, log[-3000:]
            time.sleep(0.5)

    def verify(self):
        log = self.server.log_text()
        assert not self.wrong, "\n".join([f"seed {SEED}:", *self.wrong])
        assert "compile failed" not in log and "Traceback" not in log, log[-3000:]


@pytest.fixture(scope="module")
def all_models(models_dir):
    return make_models(find_comfyui(), cache_dir(), ("sd15", "zimage") if WITH_ZIMAGE else ("sd15",))


def test_models_that_take_turns_make_their_own_images_and_stay_compiled(serve, all_models):
    """Nothing is loaded from the compile cache here."""
    rng = random.Random(SEED)
    with serve(env={"INT8_COMPILE_CACHE": "0"}) as server:
        turns = Turns(server)
        flux, wan, unet, zimage = (models(family, {} if family == "wan" else None) for family in FAMILIES)
        turns.alternate([*flux, *wan], ORDERS // 2, rng)
        turns.alternate(unet, max(1, ORDERS // 12), rng)
        if WITH_ZIMAGE:
            turns.alternate(zimage, ORDERS // 6, rng)
        turns.verify()


@pytest.mark.rotating
def test_artifacts_and_builds_in_the_background_take_turns_with_all_else(serve, models_dir, tmp_path):
    rng = random.Random(SEED)
    environment = {"INT8_COMPILE_CACHE": "1", "INT8_COMPILE_CACHE_DIR": str(tmp_path / "cache"),
                   "INT8_COMPILE_CACHE_KEY_FILE": str(tmp_path / "keys" / "key")}
    with serve(env=environment) as server:
        turns = Turns(server)
        pool = models("wan", {"background": True})
        background = [model for model in pool if model.in_background]
        for model in background:  # ordered at once, so that they are built while others take turns
            turns.take(model)
        turns.alternate(pool, ORDERS // 6, rng)
        turns.wait_for_builder()
        for model in background:
            calls = turns.take(model, built=True)
            assert calls["artifact"] and not calls["eager"] and not calls["graph"], (model.name, calls)
        turns.alternate(pool, ORDERS // 6, rng, built=True)
        turns.verify()
    with serve(env=environment) as server:  # loaded by the first sampling, and float's before there is any INT8
        turns = Turns(server)
        for model in [*background, *background]:
            calls = turns.take(model, built=True)
            assert calls["artifact"] and not calls["eager"] and not calls["graph"], (model.name, calls)
        turns.verify()


@pytest.mark.rotating
def test_models_take_turns_with_the_attention_of_gpus_too(serve, models_dir):
    rng = random.Random(SEED)
    with serve(env={"INT8_COMPILE_CACHE": "0"}, extra_args=["--use-pytorch-cross-attention"]) as server:
        turns = Turns(server)
        turns.alternate([*models("flux"), *models("wan")], max(1, ORDERS // 12), rng)
        turns.verify()
