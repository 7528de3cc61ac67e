"""Contenders whose servers stand side by side: they load and compile at the same time, and are timed in turn, while the others are idle."""
from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os

from benchmarks.comfy_server import relative_difference
from benchmarks.gpu.comfyui import (
    CORE,
    EAGER,
    OURS,
    QUANTIZE,
    STATIC,
    Contender,
    limit,
    prediction,
    reserve,
    said,
    seconds_a_step,
)
from benchmarks.gpu.context import Context
from benchmarks.gpu.server import caches, families, make_models, save_int8, serve

CONTENDERS = (
    EAGER,
    OURS,
    Contender("native INT8 compiled", (CORE,), int8=True, pack=False),
    Contender("ours compiled bf16", ("CompileModel",)),
)


def profile(context: Context) -> None:
    """Where a step of the 12 blocks goes, for each way to run them, without anything being built for the next start meanwhile.
    GPU_SUITE_ONLY: names of contenders, where time is short."""
    only = list(filter(None, os.environ.get("GPU_SUITE_ONLY", "").split(",")))
    side_by_side(context, "flux", [c for c in CONTENDERS if not only or c.name in only], profiled=True)


def dynamic(context: Context) -> None:
    """Whether weights that dynamic VRAM has on the GPU are copied: with it and without it there must be as many copies on the device
    ("Memcpy DtoD" in profile.copies), and a step must take the same time; streamed, each weight comes once a step ("Memcpy HtoD")."""
    on = "INT8LazyTorchCompile", {"disable_dynamic_vram": False}
    low = ("--reserve-vram", str(reserve(context)))
    contenders = [
        Contender("ours compiled bf16, dynamic VRAM off", ("INT8LazyTorchCompile",), extra_args=(STATIC,)),
        Contender("ours compiled bf16 with dynamic VRAM", (on,)),
        Contender("ours INT8 compiled, dynamic VRAM off", (QUANTIZE, "INT8LazyTorchCompile"), extra_args=(STATIC,)),
        Contender("ours INT8 compiled with dynamic VRAM", (QUANTIZE, on)),
    ]
    side_by_side(context, "flux", contenders[:2] if context.dry else contenders, profiled=True)
    if not context.dry:
        streamed = [Contender("eager bf16, low VRAM", (), extra_args=low),
                    Contender("ours compiled bf16 with dynamic VRAM, low VRAM", (on,), extra_args=low)]
        for contender in streamed:  # one by one: each takes what the other leaves
            side_by_side(context, "flux", [contender], profiled=True)


def full(context: Context) -> None:
    """A step of the whole Flux, 19 + 38 blocks."""
    side_by_side(context, "flux_full", CONTENDERS, profiled=False)


def side_by_side(context: Context, name: str, contenders, profiled: bool) -> None:
    family = families(context.dry)[name]
    models = make_models(context, family)
    if predicted := prediction(context, family):
        context.add(model=name, predicted=predicted)
    if any(contender.int8 for contender in contenders):
        save_int8(context, family, models)
    short, long = (1, 2) if context.dry else (4, 24)

    def first(contender: Contender, stack: contextlib.ExitStack) -> dict:
        """Starts its server and makes its first image."""
        kept = stack.enter_context(caches(context))
        if profiled:
            kept.env["INT8_COMPILE_CACHE"] = "0"
        suite = stack.enter_context(serve(context, models, kept.env, contender.extra_args, contender.pack))
        unet = family.int8 if contender.int8 else family.unet
        nodes = suite.nodes(contender.nodes)
        seconds, latent = suite.image(family, nodes, unet=unet, steps=short)
        suite.wait_for_builder()
        return {"suite": suite, "nodes": nodes, "unet": unet, "first_image_beside_others": seconds, "latent": latent}
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(len(contenders)) as pool:
        running = [(c, pool.submit(functools.partial(first, c, stack.enter_context(contextlib.ExitStack())))) for c in contenders]
        reference = None
        concurrent.futures.wait([future for _, future in running], max(5.0, context.left() - 30))
        for contender, future in running:
            row = {"model": name, "contender": contender.name}
            try:
                found = future.result(1.0)
                suite, nodes, unet, latent = (found.pop(key) for key in ("suite", "nodes", "unet", "latent"))
                reference = latent if reference is None else reference
                row |= {**found, "difference": relative_difference(latent, reference)}
                suite.memory(reset=True)
                suite.image(family, nodes, unet=unet, steps=short, seed=9)
                row["memory"] = suite.memory(pause=True)
                row["seconds_a_step"] = seconds_a_step(suite, family, nodes, unet, short, long, (2,) if context.dry else (2, 3))
                row |= {"recompiles": suite.recompiles(), **said(suite)}
                if profiled:
                    suite.start_profile()
                    suite.image(family, nodes, unet=unet, steps=short, seed=5)
                    row["profile"] = suite.profile()
                    suite.start_profile()
                    row["lora_image"], _ = suite.image(family, nodes, unet=unet, steps=short, seed=5, lora=1.0)
                    row["lora_profile"] = suite.profile()
                row["ok"] = row["difference"] < limit(contender) and not row["failures"]
            except Exception as error:  # the others go on
                row |= {"ok": False, "why": f"{type(error).__name__}: {error}"[:1500]}
            context.add(**row)
