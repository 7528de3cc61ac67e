"""60 mixed prompts on one server, each beside the same picture without compile: LoRA, size, batch, prompt length, branches, interrupts."""
from __future__ import annotations

import os
import random
import time

from benchmarks.comfy_server import relative_difference
from benchmarks.gpu.comfyui import QUANTIZE, said
from benchmarks.gpu.context import Context
from benchmarks.gpu.server import Suite, add_branch, caches, families, make_models, prompt, serve

PROMPTS = 60
DRY_PROMPTS = 6
# The compiled INT8 model against the same INT8 layers eager, and bf16 against bf16: fused kernels round to bf16 less often. A LoRA that is
# missing costs 0.2.
LIMIT = 0.06
LORAS = (0.0, 0.5, 1.0)
KINDS = ("INT8", "INT8", "bf16")
WHAT = ("plain", "two branches", "plain", "interrupt")


def run(context: Context) -> None:
    """GPU_SUITE_PROMPTS: how many of the small model, in a dry run."""
    family = families(context.dry)["flux"]
    models = make_models(context, family)
    random.seed(5)
    count = (2 if context.cheap else int(os.environ.get("GPU_SUITE_PROMPTS", DRY_PROMPTS))) if context.dry else PROMPTS
    with caches(context) as kept, serve(context, models, kept.env) as suite:
        compilers = {"INT8": ([QUANTIZE], "INT8LazyTorchCompile"), "bf16": ([], "CompileModel")}
        if context.dry:
            compilers["bf16"] = [], ("CompileModel", {"backend": "aot_eager"})
        wrong, worst, first = [], 0.0, {}
        for number in range(count):
            if context.left() < 10:
                context.add(prompt=number, skipped="no time left")
                break
            kind, what = KINDS[number % len(KINDS)], WHAT[number % len(WHAT)]
            before, after = compilers[kind]
            change = {"lora": random.choice(LORAS), "size": random.choice((0, 1)), "batch": random.choice((1, 1, 1, 2)),
                      "seed": number, "tokens": random.choice((0, 64)), "steps": random.choice((2, 3))}
            recompiles = suite.recompiles()
            difference, interrupted = one(suite, family, suite.nodes(before), suite.nodes([*before, after]), change, what, number)
            new = suite.recompiles() - recompiles
            worst = max(worst, difference)
            ok = difference < LIMIT
            if not ok:
                wrong.append(number)
            shape = (kind, change["batch"])
            row = {"prompt": number, "kind": kind, "what": what, **change, "difference": difference, "interrupted": interrupted,
                   "recompiles": new, "ok": ok}
            # A batch other than 1 is a graph of its own: the first of each may compile.
            row["first_of_its_kind"] = shape not in first
            first.setdefault(shape, number)
            if new and not row["first_of_its_kind"]:
                row |= {"ok": False, "why": recompile_reason(suite)}
            context.add(**row)
        found = said(suite)
        context.add(total=count, wrong=wrong, worst=worst, recompiles=suite.recompiles(), **found,
                    ok=not wrong and not found["failures"])


def one(suite: Suite, family, eager: list, compiled: list, change: dict, what: str, number: int) -> tuple[float, bool]:
    """The relative difference of a compiled picture (or the worse of two) from the eager one; whether another was interrupted before."""
    interrupted, lora = False, change["lora"]
    if what == "two branches":
        found = []
        for nodes in (eager, compiled):
            content = prompt(family, nodes, **change)
            add_branch(content, "second_", family, nodes, 1.0 if lora < 1 else 0.0, change["steps"], change["seed"] + 1000)
            found.append(suite.run(content)[1])
        return max(relative_difference(b, a) for a, b in zip(*found)), False
    if what == "interrupt":
        content = prompt(family, compiled, **{**change, "steps": 40, "seed": 5000 + number})
        queued = suite.server.queue(content)
        time.sleep(random.choice((0.2, 0.6, 1.2)))
        suite.server.interrupt()
        result = suite.server.wait(queued, timeout=max(5.0, suite.context.left()))
        interrupted = result.status == "interrupted"
        if result.status not in ("interrupted", "success"):
            raise RuntimeError(f"interrupted prompt {number} ended with {result.status}: {result.error}")
    want = suite.image(family, eager, **change)[1]
    return relative_difference(suite.image(family, compiled, **change)[1], want), interrupted


def recompile_reason(suite: Suite) -> str:
    log = suite.log()
    return log[log.rindex("Recompiling function"):][:600] if "Recompiling function" in log else ""
