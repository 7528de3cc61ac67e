"""Whole models on a ComfyUI server: each way to run them beside eager bf16.

A contender has servers of its own with empty compiler caches. Its row: the first image (loading and compiling included), seconds a step
(two lengths of the same picture, so that loading and saving cancel), another size, batch 2, a LoRA, peaks of memory, recompiles, the
relative difference from eager bf16 of the same seed, and for some the first image after a restart.
"""
from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.comfy_server import relative_difference
from benchmarks.gpu.cards import CARDS, predicted_step
from benchmarks.gpu.context import Context
from benchmarks.gpu.server import Family, Suite, caches, families, make_models, save_int8, serve

QUANTIZE = "INT8QuantizeModel", {"method": "convrot"}
CORE = "TorchCompileModel", {"backend": "inductor"}
STATIC = "--disable-dynamic-vram"


@dataclass(frozen=True)
class Contender:
    """int8: reads the native INT8 file. restart: starts a second time with what was kept. alone: seconds that must be left to begin."""

    name: str
    nodes: tuple = ()
    int8: bool = False
    extra_args: tuple[str, ...] = ()
    restart: bool = False
    needs: float = 45.0
    pack: bool = True


EAGER = Contender("eager bf16", restart=True)
OURS = Contender("ours INT8 compiled", (QUANTIZE, "INT8LazyTorchCompile"), restart=True)
CONTENDERS = (
    EAGER,
    OURS,
    Contender("ours compiled bf16", ("CompileModel",)),
    Contender("native INT8 compiled", (CORE,), int8=True, pack=False),
    Contender("core compiled bf16", (CORE,), restart=True, pack=False),
    Contender("ours INT8 from file, compiled", (QUANTIZE, "INT8LazyTorchCompile"), int8=True),
    Contender("ours INT8 eager", (QUANTIZE,)),
    Contender("native INT8 eager", int8=True, pack=False),
)
# The 19 + 38 blocks: what the time allows, what takes longest last.
FULL = (EAGER, Contender("ours INT8 from file, compiled", (QUANTIZE, "INT8LazyTorchCompile"), int8=True),
        Contender("ours compiled bf16", ("CompileModel",)), OURS, Contender("native INT8 eager", int8=True, pack=False),
        Contender("core compiled bf16", (CORE,), needs=120, pack=False),
        Contender("native INT8 compiled", (CORE,), int8=True, needs=120, pack=False))
SHORT = (EAGER, OURS, Contender("ours compiled bf16", ("CompileModel",)), Contender("native INT8 eager", int8=True, pack=False),
         Contender("ours INT8 eager", (QUANTIZE,)), Contender("native INT8 compiled", (CORE,), int8=True, pack=False))


def flux(context: Context) -> None:
    contenders = CONTENDERS
    if context.dry:  # a compile takes 15 to 45 s here
        contenders = (EAGER, OURS, *[c for c in CONTENDERS if c.name in ("ours INT8 eager", "native INT8 eager")])
        contenders = (EAGER,) if context.cheap else contenders
    race(context, "flux", contenders)


def flux_full(context: Context) -> None:
    race(context, "flux_full", (EAGER, *FULL[4:5]) if context.dry else FULL)


def wan(context: Context) -> None:
    race(context, "wan", (EAGER, *SHORT[3:5]) if context.dry else SHORT)


def sdxl(context: Context) -> None:
    race(context, "sdxl", (EAGER, SHORT[4]) if context.dry else SHORT)


def memory(context: Context) -> None:
    """Dynamic VRAM on (the rows of step flux) and off, low VRAM: most of the card is reserved, so that weights are streamed."""
    lazy = "INT8LazyTorchCompile", {"disable_dynamic_vram": False}
    low = ("--reserve-vram", str(reserve(context)))
    contenders = [
        Contender("eager bf16", ()),
        Contender("eager bf16, dynamic VRAM off", (), extra_args=(STATIC,)),
        Contender("ours INT8 compiled, dynamic VRAM off", (QUANTIZE, "INT8LazyTorchCompile"), extra_args=(STATIC,)),
        Contender("ours INT8 compiled with dynamic VRAM", (QUANTIZE, lazy)),
        Contender("ours INT8 eager, dynamic VRAM off", (QUANTIZE,), extra_args=(STATIC,)),
        Contender("eager bf16, low VRAM", (), extra_args=(STATIC, *low)),
        Contender("ours INT8 compiled, low VRAM", (QUANTIZE, "INT8LazyTorchCompile"), extra_args=(STATIC, *low)),
        Contender("ours INT8 compiled with dynamic VRAM, low VRAM", (QUANTIZE, lazy), extra_args=low),
        Contender("native INT8 eager, low VRAM", int8=True, extra_args=(STATIC, *low), pack=False),
    ]
    race(context, "flux", [contenders[i] for i in (0, 4)] if context.dry else contenders, lora=True)


def reserve(context: Context) -> int:
    """GB that leave 4 GB of the card: the 12 blocks of step flux have 5 GB in bf16."""
    if context.device == "cpu":
        return 1
    import torch

    return max(1, int(torch.cuda.get_device_properties(0).total_memory / 2**30) - 4)


def modes(context: Context) -> None:
    """Modes of torch.compile, with torch's own allocator, which CUDA graphs need."""
    native = ("--disable-cuda-malloc",)
    lazy, compile_model = "INT8LazyTorchCompile", "CompileModel"
    backend = {"backend": "aot_eager"} if context.dry else {}
    contenders = [Contender("eager bf16", extra_args=native),
                  Contender("INT8, reduce-overhead", (QUANTIZE, (lazy, {"mode": "reduce-overhead"})), extra_args=native),
                  Contender("INT8, default", (QUANTIZE, lazy), extra_args=native),
                  Contender("bf16, reduce-overhead", ((compile_model, {"mode": "reduce-overhead"}),), extra_args=native),
                  Contender("bf16, default", ((compile_model, backend),), extra_args=native),
                  Contender("INT8, cudagraphs", (QUANTIZE, (lazy, {"backend": "cudagraphs"})), extra_args=native),
                  Contender("INT8, max-autotune-no-cudagraphs", (QUANTIZE, (lazy, {"mode": "max-autotune-no-cudagraphs"})),
                            extra_args=native, needs=120),
                  Contender("bf16, max-autotune-no-cudagraphs", ((compile_model, {"mode": "max-autotune-no-cudagraphs"}),),
                            extra_args=native, needs=120),
                  Contender("INT8, max-autotune", (QUANTIZE, (lazy, {"mode": "max-autotune"})), extra_args=native, needs=120)]
    race(context, "flux", [contenders[i] for i in (0, 4, 5)] if context.dry else contenders)


def race(context: Context, name: str, contenders: Sequence[Contender], lora: bool = True) -> None:
    """A row for each contender; the first is the reference of all."""
    family = families(context.dry)[name]
    models = make_models(context, family)
    if predicted := prediction(context, family):
        context.add(model=name, predicted=predicted)
    reference = None
    for contender in contenders:
        if context.left() < (5 if context.dry else contender.needs):
            context.add(model=name, contender=contender.name, skipped="no time left")
            continue
        row = {"model": name, "contender": contender.name}
        try:
            latents = measure(context, family, contender, models, row, lora)
            reference = reference or latents
            row["difference"] = {key: relative_difference(latent, reference[key]) for key, latent in latents.items() if key in reference}
            row["ok"] = all(value < limit(contender) for value in row["difference"].values()) and not row.get("failures")
        except Exception as error:  # the others go on
            row |= {"ok": False, "why": f"{type(error).__name__}: {error}"[:1500]}
        context.add(**row)


def prediction(context: Context, family: Family) -> dict | None:
    """What a step takes at the card's rates, before it is measured; in a dry run, an H200's."""
    name = "NVIDIA H200"
    if context.device == "cuda":
        import torch

        name = torch.cuda.get_device_name(0)
    if name not in CARDS:
        return None
    found = predicted_step(CARDS[name], family.spec, family.sizes[0], family.cond[0], 1 if family.cfg == 1.0 else 2, family.frames)
    return found and {"card": name, **found}


def limit(contender: Contender) -> float:
    """Relative difference from eager bf16 of a latent after four steps. Fused kernels round to bf16 less often, which random blocks
    amplify; a wrong picture is off by 0.3 or more."""
    return 0.15 if contender.int8 or QUANTIZE in contender.nodes else 0.06


def measure(context: Context, family: Family, contender: Contender, models, row: dict, lora: bool) -> dict:
    """Fills row: -> {change: latent}."""
    short, long = (1, 2) if context.dry else (4, 12)
    brief = context.cheap or (context.dry and family.name == "sdxl")  # 850 million weights: there is no smaller one that loads
    unet = family.int8 if contender.int8 else family.unet
    if contender.int8:
        save_int8(context, family, models)
    with caches(context) as kept:
        with serve(context, models, kept.env, contender.extra_args, contender.pack) as suite:
            nodes = suite.nodes(contender.nodes)
            suite.memory(reset=True)
            latents = {}
            row["first_image"], latents["first"] = suite.image(family, nodes, unet=unet, steps=short)
            row["memory_first"] = suite.memory(reset=True)
            row["seconds_a_step"] = seconds_a_step(suite, family, nodes, unet, short, long, (2,) if context.dry else (2, 3, 4))
            row["memory_steps"] = suite.memory()
            changes = {"size": {"size": 1}, "batch": {"batch": 2}, **({"lora": {"lora": 1.0}} if lora else {})}
            before = suite.recompiles()
            for change, arguments in changes.items():
                if brief or context.left() < 20:
                    break
                row[f"{change}_image"], latents[change] = suite.image(family, nodes, unet=unet, steps=short, **arguments)
            row |= {"recompiles_first": before, "recompiles_changes": suite.recompiles() - before, **said(suite)}
            if contender.restart and not brief:
                row["builder_seconds"] = suite.wait_for_builder()
        if contender.restart and (contender.nodes or not context.dry) and not brief and context.left() > 30:
            with serve(context, models, kept.env, contender.extra_args, contender.pack) as suite:
                row["restart_image"], latents["first again"] = suite.image(family, suite.nodes(contender.nodes), unet=unet, steps=short)
                row["restart_recompiles"] = suite.recompiles()
            row["restart_difference"] = relative_difference(latents.pop("first again"), latents["first"])
    return latents


def seconds_a_step(suite: Suite, family: Family, nodes, unet: str, short: int, long: int, seeds: Sequence[int]) -> float:
    """The median over seeds of the difference between two lengths."""
    found = []
    for seed in seeds:
        brief, _ = suite.image(family, nodes, unet=unet, steps=short, seed=seed)
        whole, _ = suite.image(family, nodes, unet=unet, steps=long, seed=seed)
        found.append((whole - brief) / (long - short))
    return statistics.median(found)


def said(suite: Suite) -> dict:
    """What the log says: weights before and after, what was compiled, failures and fallbacks, errors of other kinds."""
    log = suite.log()
    weights = re.findall(r"weights ([\d.]+) -> ([\d.]+) MB", log)
    return {"weights_mb": list(map(float, weights[-1])) if weights else None, "weights_ratio": float(weights[-1][1]) / float(weights[-1][0])
            if weights else None, "compiled": re.findall(r"compiled (\S+ x\d+.*)", log)[:4],
            "failures": [line[:400] for line in log.splitlines() if "compile failed" in line],
            "notes": [line[:300] for line in log.splitlines() if "CUDA graphs need" in line or "which is the limit" in line][:4],
            "errors": [line[:300] for line in log.splitlines() if "Error" in line and "Recompiling" not in line][:5]}
