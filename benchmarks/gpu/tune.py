"""Measures every candidate for every shape of real models, and writes the table that ships for this card."""
from __future__ import annotations

import datetime
import math

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.kernels import interpreter_of_today
from benchmarks.int8_linear import SHAPES
from benchmarks.wrapper_overhead import load_pack

# What a block's modulation has, besides the layers that tokens go through: (K, N), rows 1 to 16.
MODULATIONS = ((3072, 18432), (3072, 9216))
DRY_SHAPES, DRY_ROWS = ((64, 48),), (16,)


def run(context: Context) -> None:
    load_pack()
    from int8_compile.int8.kernels import fastest, tables, tuning

    device = torch.device(context.device)
    card = fastest.card(device) if device.type == "cuda" else "Test Card"
    shapes = DRY_SHAPES if context.dry else tuple(dict.fromkeys((*(s for group in SHAPES.values() for s in group), *MODULATIONS)))
    found, facts = {}, {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    # The buckets that images and videos fall into first: with little time the rest stays to the user's machine.
    buckets = DRY_ROWS if context.dry else sorted(tuning.BUCKETS, key=lambda m: abs(math.log2(m / 4096)))
    with interpreter_of_today(), torch.inference_mode():
        for m in buckets:
            for k, n in shapes:
                if context.left() < 10:
                    break
                if (k, n) in MODULATIONS and m > 16:
                    continue
                dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
                row = tune(fastest, tables, tuning, card, (m, k, n), dtype, device, found)
                context.add(**row)
            path = tables.save(context.tables, card, fastest.stack(), facts, found)
    loaded = tables.load(context.tables)
    context.add(table=path.name, entries=len(found), stack=fastest.stack(), choices=found,
                ok=all(loaded[tables.key(card, fastest.stack(), shape)] == name for shape, name in found.items()))


def tune(fastest, tables, tuning, card, shape, dtype, device, found: dict) -> dict:
    """Adds the choice for a shape to found: -> what it measured."""
    m, k, n = shape
    q, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    arguments = (q, torch.rand(m, device=device), w, torch.rand(n, 1, device=device), torch.randn(n, device=device).to(dtype), dtype)
    candidates = fastest.candidates(q, w, None)
    names, taken, seconds = iter(candidates), {}, fastest.timer(device)

    def measured(call):
        name = next(names)
        taken[name] = float("nan")
        taken[name] = seconds(call)
        return taken[name]
    key = fastest.shape_key(q, w, dtype)
    best = found[key] = fastest.choose(tuning.Choices(None, budget=math.inf), tables.key(card, fastest.stack(), key), candidates, arguments,
                                       measured)
    first = next(iter(candidates))
    return {"M": m, "K": k, "N": n, "chosen": best, "tops": 2 * m * k * n / taken[best] / 1e12, "heuristic": first,
            "gain_over_heuristic": taken[first] / taken[best], "int_mm_ratio": taken["torch._int_mm"] / taken[best],
            "failed": [name for name, value in taken.items() if value != value]}
