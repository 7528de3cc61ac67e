"""Which of ComfyUI's model families the compile cache keeps, and why not the others, as a table.

    python benchmarks/families.py [--only NAME ...] [--pytorch-attention] [--inductor] [--json FILE] [--markdown FILE]

Each is a small random model of ComfyUI's own class on a CPU (small_families.py), called at four sizes: as it is, at another resolution,
with a longer prompt, and as a batch of two. Then once more as a new process would, from what was kept. Without --inductor the compiled
code is the exported program, which torch runs: what is kept is the same, and it takes seconds, not minutes, a family.
Run it with a Python that can run ComfyUI.
"""
from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import find_comfyui  # noqa: E402

CALLS = {"first": {}, "resolution": dict(height=44, width=52), "prompt": dict(tokens=28), "batch 2": dict(batch=2)}
COLUMNS = "family", "blocks of", "graphs", "breaks", "again for", "kept", "difference", "restart", "not kept, since"


def load_pack(pytorch_attention: bool) -> None:
    """ComfyUI and this pack in this process, on the CPU."""
    sys.path.insert(0, str(find_comfyui()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = pytorch_attention
    spec = importlib.util.spec_from_file_location("int8_compile", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["int8_compile"] = module
    spec.loader.exec_module(module)
    from int8_compile.compile.comfyui.attention import add_functions
    from int8_compile.compile.comfyui.int8_layer import patch_linear_input_act

    add_functions()
    patch_linear_input_act()


class Here:
    """A builder in this process. tiers: of export.build."""

    def __init__(self, store, tiers: tuple[str, ...]):
        self._store, self._tiers = store, tiers

    def submit(self, order) -> None:
        import torch
        from int8_compile.compile.artifacts import export

        logging.disable()  # handlers would be traced
        try:
            with torch.inference_mode(False):
                self._store.build_once(order.place, order.entry, lambda folder: export.build(order.job, folder, tiers=self._tiers),
                                       order.replaces is not None)
            order.done("")
        except Exception as error:
            order.done(f"{type(error).__name__}: {error}".partition("\n")[0])
        finally:
            logging.disable(logging.NOTSET)

    def sampling(self, device):
        import contextlib

        return contextlib.nullcontext()


_programs: dict[str, tuple] = {}


def exported_tier() -> list[tuple[dict, object]]:
    """What is to be put under "export", and where, for a tier whose artifact is the number of an exported program that this process
    keeps."""
    from int8_compile.compile.artifacts import artifact, compilers

    def build(program, job, path):
        path.write_text(str(len(_programs)))
        _programs[path.read_text()] = program.module(), len(job.tensors)

    def load(entry, device):
        program, tensors = _programs[entry.read("artifact.export").decode()]
        return lambda values: program(list(values[:tensors]), list(values[tensors:]))
    return [(compilers.COMPILERS, build), (artifact.LOADERS, load), (artifact.FILES, "artifact.export")]


def measure(family, tiers: tuple[str, ...]) -> dict:
    """A row of the table."""
    from int8_compile.compile.artifacts.runtime import Cache
    from int8_compile.compile.artifacts.store import CacheStore
    from int8_compile.compile.engine import CompiledModule
    from int8_compile.compile.options import CompileOptions

    model, start = family.build(), time.perf_counter()

    def run(compiled, sizes):
        return compiled.run(model, lambda: family.call(model, **sizes), filter_guards=True, passthrough=lambda error: False)
    calls = {name: sizes if family.batches else {**sizes, "batch": 1} for name, sizes in CALLS.items()}
    wanted = {name: family.call(model, **sizes) for name, sizes in calls.items()}
    here = CompiledModule(CompileOptions(backend="eager", mark_sizes=True))
    again, before = [], 0
    for name, sizes in calls.items():
        run(here, sizes)
        again += [name] if before and here.report.graphs > before else []
        before = here.report.graphs
    with tempfile.TemporaryDirectory() as folder:
        store = CacheStore(Path(folder) / "cache", Path(folder) / "key" / "cache.key")

        def cached():
            return CompiledModule(CompileOptions(mark_sizes=True, background=True), cache=Cache(store, Here(store, tiers)))
        kept, differences, served, blocks = cached(), [], 0, 0
        for name, sizes in calls.items():
            run(kept, sizes)  # the first may build
            got = run(kept, sizes)
            differences.append(((got - wanted[name]).abs().max() / wanted[name].abs().max()).item())
            served += kept.report.last_calls["artifact"]
            blocks += sum(kept.report.last_calls.values())
        restarted = cached()
        got = run(restarted, calls["first"])
        restart = "same" if restarted.report.last_calls.get("eager") == 0 and (got - wanted["first"]).abs().max() <= (
            differences[0] + 1e-6) * wanted["first"].abs().max() else "partly" if restarted.report.last_calls.get("artifact") else "no"
    reasons = dict.fromkeys(text.partition(": running uncompiled")[0] for text in kept.report.fallbacks)
    return {"family": family.name, "blocks of": ", ".join(f"{name} x{count}" for name, count in here.report.regions),
            "graphs": here.report.graphs, "breaks": sum(here.report.breaks.values()), "again for": ", ".join(again) or "nothing",
            "kept": f"{served} of {blocks}", "difference": f"{max(differences):.0e}", "restart": restart,
            "not kept, since": "; ".join(reasons) or here.report.failure, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--pytorch-attention", action="store_true", help="the attention that ComfyUI uses on GPUs, not a CPU's default")
    parser.add_argument("--inductor", action="store_true", help="build what users get")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    os.environ["INT8_COMPILE_CACHE"] = "0"
    load_pack(options.pytorch_attention)
    import torch

    from benchmarks.small_families import MORE, SMALL

    for table, value in exported_tier():
        table["export"] = value
    torch.backends.mkldnn.enabled = False  # it takes convolutions by their size, a guard that only CPUs have
    rows, families = [], SMALL | MORE
    for name in options.only or families:
        try:
            with torch.inference_mode():
                rows.append(measure(families[name], ("aoti",) if options.inductor else ("export",)))
        except Exception as error:
            rows.append({"family": name, "not kept, since": f"{type(error).__name__}: {error}".partition("\n")[0]})
        print(json.dumps(rows[-1]), flush=True)
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__,
             "attention": "pytorch" if options.pytorch_attention else "default", "code": "inductor" if options.inductor else "exported"}
    if options.json:
        options.json.write_text(json.dumps({**facts, "families": rows}, indent=1) + "\n")
    if options.markdown:
        lines = [f"# Model families in the compile cache, {facts['date']}", "",
                 f"torch {facts['torch']}, CPU, {facts['attention']} attention, {facts['code']} programs; by `benchmarks/families.py`, "
                 "which says more. *Kept*: calls of blocks that were served from what was kept, of all in four sizes.", "",
                 "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += [f"| {' | '.join(str(row.get(column, '')) for column in COLUMNS)} |" for row in rows]
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
