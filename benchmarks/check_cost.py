"""What it costs to look whether compiled code is still right, on Flux's own structure (19 double and 38 single blocks, narrow):
microseconds a step and a block call; and what the checks against eager cost: block calls in the first image, a step later with them as a
ratio to one without, in pairs. Needs ComfyUI.

    python benchmarks/check_cost.py [--json FILE]
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import find_comfyui  # noqa: E402
from benchmarks.demo_report import cpu_name  # noqa: E402
from benchmarks.wrapper_overhead import load_pack  # noqa: E402

ROUNDS = 200


class BuildHere:
    """Builds at once, up to the exported program, which is not what is timed."""

    def __init__(self, store):
        self.store = store

    def submit(self, order):
        from int8_compile.compile.artifacts import export as aoti

        with torch.inference_mode(False):
            self.store.build_once(order.place, order.entry, lambda folder: aoti.build(order.job, folder, tiers=("export",)))
        order.done("")

    @contextlib.contextmanager
    def sampling(self, device):
        yield


def flux() -> torch.nn.Module:
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    torch.manual_seed(0)
    return Flux(in_channels=16, out_channels=16, vec_in_dim=8, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=19,
                depth_single_blocks=38, axes_dim=[4, 6, 6], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
                device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init).eval().requires_grad_(False)


def microseconds(call) -> float:
    """The median of ROUNDS calls."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def ratio(call, other) -> float:
    """The median of ROUNDS pairs of times, call's over other's, which of them comes first changing."""
    found = []
    for number in range(ROUNDS):
        seconds = {}
        for each in (call, other) if number % 2 else (other, call):
            start = time.perf_counter()
            each()
            seconds[each] = time.perf_counter() - start
        found.append(seconds[call] / seconds[other])
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(find_comfyui()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = comfy.cli_args.args.use_pytorch_cross_attention = True
    load_pack()
    from int8_compile.compile.artifacts import artifact, compilers
    from int8_compile.compile.artifacts.runtime import Cache
    from int8_compile.compile.artifacts.store import CacheStore
    from int8_compile.compile.engine import CompiledModule
    from int8_compile.compile.options import CompileOptions
    from int8_compile.compile.verification.verifier import VerificationOptions

    programs = []

    def build(program, job, path):
        programs.append((program.module(), len(job.tensors)))
        path.write_text(str(len(programs) - 1))

    def load(entry, device):
        program, tensors = programs[int(entry.read(artifact.FILES["export"]))]
        return lambda values: program(list(values[:tensors]), list(values[tensors:]))
    compilers.COMPILERS["export"], artifact.LOADERS["export"], artifact.FILES["export"] = build, load, "artifact.export"
    torch.set_num_threads(1)
    result = {"blocks": 57, "cpu": cpu_name(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        net = flux()
        x, timestep, context, y = torch.randn(1, 16, 8, 8), torch.tensor([0.5]), torch.randn(1, 8, 16), torch.randn(1, 8)

        def step(compiled):
            return compiled.run(net, lambda: net(x, timestep, context, y=y, guidance=timestep, transformer_options={}), filter_guards=True,
                                passthrough=lambda error: False)
        here = CompiledModule(CompileOptions(mark_sizes=True, dynamic=False, backend="eager"))
        store = CacheStore(Path(folder) / "cache", Path(folder) / "key" / "cache.key")
        kept = CompiledModule(CompileOptions(mark_sizes=True, dynamic=False, background=True), cache=Cache(store, BuildHere(store)))
        for compiled in (here, kept):
            for _ in range(4):
                step(compiled)
        assert here.report.last_calls["graph"] == kept.report.last_calls["artifact"] == 57, (here.report, kept.report)
        regions, states = kept._regions, list(kept._states.values())
        result["step_us"] = {
            "slots and classes": microseconds(regions.is_current),
            "code and values, compiled here": microseconds(lambda: [state.code.find(True) for state in here._states.values()]),
            "code and values, artifacts": microseconds(lambda: [state.artifacts.begin() for state in states])}
        block = regions[0].modules[0]
        known = kept._blocks[id(block)]
        (guards,) = known.info.guards.values()
        (loaded,) = known.region.artifacts._loaded[next(iter(known.region.artifacts._loaded))]
        result["call_us"] = {"values": microseconds(loaded.change_on_the_way), "attributes": microseconds(guards.is_unchanged),
                             "weights": microseconds(known.info.weights.get), "hooks": microseconds(lambda: regions.has_hooks(block))}
        checked = CompiledModule(here.options, verification=VerificationOptions())
        for _ in range(4):
            step(checked)
        assert set(checked.report.checked) == {"DoubleStreamBlock", "SingleStreamBlock"} and not checked.report.warnings(), checked.report
        result["checks"] = {"block calls more in the first image": checked.report.checks,
                            "a later step, ratio": ratio(functools.partial(step, checked), functools.partial(step, here)),
                            "the same twice without, ratio": ratio(functools.partial(step, here), lambda: step(here))}
        result["modules"] = sum(1 for _ in net.modules())
    for name in ("step_us", "call_us", "checks"):
        sys.stdout.write("\n".join([f"{name}:", *(f"  {what:36} {value:8.4g}" for what, value in result[name].items())]) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
