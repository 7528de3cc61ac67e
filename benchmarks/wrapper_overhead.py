"""What the compile wrapper itself costs a step: 57 blocks through CompiledModule.run, beside the same compiled blocks called straight.

    python benchmarks/wrapper_overhead.py [--json FILE]
"""
from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.demo_report import cpu_name  # noqa: E402

BLOCKS, STEPS = 57, 300


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 8)
        self.down = torch.nn.Linear(8, 8)

    def forward(self, img, txt, vec, pe, transformer_options=None):
        return self.down(self.up(img)) + vec, txt


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block() for _ in range(BLOCKS)])

    def forward(self, img, txt, vec, pe):
        for block in self.blocks:
            img, txt = block(img, txt, vec=vec, pe=pe, transformer_options={})
        return img


def load_pack():
    spec = importlib.util.spec_from_file_location("int8_compile", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["int8_compile"] = module
    spec.loader.exec_module(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    load_pack()
    from int8_compile.compile.engine import CompiledModule
    from int8_compile.compile.options import CompileOptions

    net, torch_blocks = Net().eval().requires_grad_(False), Net().eval().requires_grad_(False)
    inputs = [torch.randn(1, 16, 8), torch.randn(1, 4, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 16, 4)]
    compiled = CompiledModule(CompileOptions(backend="aot_eager", mark_sizes=True))

    def entry(module, *args, **kwargs):
        return module._call_impl(*args, **kwargs)

    straight = torch.compile(entry, backend="aot_eager")
    for block in torch_blocks.blocks:
        block._compiled_call_impl = functools.partial(straight, block)
    calls = {"wrapper": lambda: compiled.run(net, lambda: net(*inputs), filter_guards=True, passthrough=lambda error: False),
             "torch": lambda: torch_blocks(*inputs)}
    times = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(STEPS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    assert compiled.report.regions == [("Block", BLOCKS)] and not compiled.report.failure, compiled.report
    milliseconds = {name: statistics.median(values[20:]) * 1e3 for name, values in times.items()}
    milliseconds["overhead"] = milliseconds["wrapper"] - milliseconds["torch"]
    print(f"{BLOCKS} blocks, {cpu_name()}, torch {torch.__version__}: " + ", ".join(f"{k} {v:.3f} ms" for k, v in milliseconds.items()))
    if arguments.json:
        facts = {"date": datetime.date.today().isoformat(), "device": cpu_name(), "torch": torch.__version__, "blocks": BLOCKS}
        arguments.json.write_text(json.dumps({**facts, "milliseconds": milliseconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
