"""What inductor makes of Flux's blocks for a GPU that is not here: graphs, calls, the tensors that each reads and writes, and the least
time that these take at a card's rates. Every Triton kernel is compiled to a cubin; nothing runs. Needs ComfyUI and Triton.

    python benchmarks/lowered_blocks.py [--json FILE] [--table FILE]
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).absolute().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "rehearsal")]
import card as rehearsal  # noqa: E402

from benchmarks import tiny_models  # noqa: E402
from benchmarks.comfy_server import find_comfyui  # noqa: E402
from benchmarks.gpu import cards  # noqa: E402
from benchmarks.wrapper_overhead import load_pack  # noqa: E402

# Whom torch is told that it runs on, for each architecture, and the cards whose rates are put to what it makes for that.
TARGETS = {"NVIDIA A100-SXM4-80GB": ("NVIDIA A100-SXM4-80GB",),
           "NVIDIA GeForce RTX 4090": ("NVIDIA GeForce RTX 4090", "NVIDIA L40S"),
           "NVIDIA H100 80GB HBM3": ("NVIDIA H100 80GB HBM3",)}
WEIGHTS = ("bf16", "int8")
DEPTH = {"DoubleStreamBlock": 19, "SingleStreamBlock": 38}  # Flux's
# Busy milliseconds of 4 steps of 4 double and 8 single blocks, in a profile of an H100 SXM at the same sizes (torch 2.11).
MEASURED_CARD = "NVIDIA H100 80GB HBM3"
MEASURED_DEPTH, MEASURED_STEPS = {"DoubleStreamBlock": 4, "SingleStreamBlock": 8}, 4
MEASURED = {"bf16": {"all": 126.7}, "int8": {"all": 108.2, "attention": 37.4, "int8 gemm": 40.7, "quantizer": 9.4, "rope": 3.3,
                                             "gelu + cat": 3.4,
                                             "layer norm, modulation": 4.0}}
MEASURED_OTHERS = {"eager bf16": 145.7, "ComfyUI's own INT8, compiled": 141.9}
PARTS = ("int8 gemm", "attention", "quantizer", "rope", "triton")
KINDS = {"int8 gemm": "products", "triton": "fused kernels"}
SHOWN = ("NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3")
GROUP = 256  # of the rotation
# What was found out with torch 2.11 and Triton 3.6.
LIMITS = (
    "- Dynamo, AOTAutograd, the passes, inductor's scheduler and code, and Triton's compiler up to the cubin need no GPU and no driver. "
    "Stood in for are torch.cuda's functions (what card it is), Triton's driver (the target), and which kernel "
    "`scaled_dot_product_attention` takes: C++ asks the driver, so flash attention is named.",
    "- A number put on the card (`torch.tensor(2.0, device=\"cuda\")`) keeps its value even as a fake tensor, and torch computes with it "
    "on the card: inductor's own patterns have such numbers, and get them without a value here.",
    "- Of the launches of a kernel (block sizes) inductor takes the one that is fastest on the card: all are compiled here, none chosen. "
    "The products of bf16 are cuBLAS's and attention is torch's: their bytes and operations are counted, their code is not seen.",
    "- AOTInductor's CUDA package of a bf16 double block (width 256) has been built without a GPU, in 40 s: `cuda.h` and `crt/` as Triton "
    "ships them, `nv/target` of the wheel nvidia-cuda-cccl (`CPATH`), a `libcuda.so` with the driver's names to link with "
    "(`LIBRARY_PATH`), and, in the place of the run that tunes (`generate_and_run_autotune_block`), the first launch of each kernel, put "
    "into `CudaKernelParamCache`. Its cubins are of the architecture that was named. It has not been loaded on a GPU, nor has one with "
    "INT8 layers been built.",
)

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention


@dataclasses.dataclass
class Call:
    """One launch, as the generated code makes it. kind: triton, int8 gemm, quantizer, gemm, attention, rope or other. reads, writes:
    {tensor: (type and sizes, bytes that are moved)}. operations: of tensor cores."""

    name: str
    kind: str
    reads: dict[str, tuple[str, int]]
    writes: dict[str, tuple[str, int]]
    operations: int = 0

    @property
    def bytes(self) -> int:
        return sum(size for tensors in (self.reads, self.writes) for _, size in tensors.values())

    def seconds(self, card: cards.Card) -> float:
        rate = card.int8 if self.kind == "int8 gemm" else card.bf16
        return max(self.operations / rate, self.bytes / card.bandwidth)


@dataclasses.dataclass
class Graph:
    """What inductor made of one graph. kernels: {name: what its cubin takes, for each of the launches that a card would try}."""

    region: str
    calls: list[Call] = dataclasses.field(default_factory=list)
    kernels: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    parts: dict[str, str] = dataclasses.field(default_factory=dict)  # {tensor: the one that it is written into}


def attention_as_on_a_card():
    """F.scaled_dot_product_attention asks the driver which kernel it takes (in C++): told that it is flash attention, which is what CUDA
    takes for bf16 heads of 128 without a mask. Returns what must be kept alive."""
    sdpa = torch.ops.aten.scaled_dot_product_attention.default

    def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        assert attn_mask is None and not enable_gqa and q.shape[-1] <= 256
        return ATTENTION(q, k, v, dropout_p, is_causal, scale=scale)[0]
    sdpa.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(flash)  # under inference mode
    library = torch.library.Library("aten", "IMPL")
    for key in ("CUDA", "AutogradCUDA"):
        library.impl("scaled_dot_product_attention", flash, key)
    return library


def tensors_of_numbers():
    """torch.tensor on the card: a fake tensor, which torch otherwise keeps the value of, and computes with it there."""
    real = torch.tensor

    @functools.wraps(real)
    def tensor(*args, device=None, **kwargs):
        made = real(*args, **kwargs)
        return made if device is None else torch.empty(made.shape, dtype=made.dtype, device=device)
    return mock.patch.object(torch, "tensor", tensor)


class NoDriver:
    """Triton's driver, which is asked for the target only."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        major, minor = torch.cuda.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)


class Lowering:
    """While it is entered, what torch.compile makes for CUDA is kept in graphs, and is not run: the graph is, on fake tensors."""

    def __init__(self, compile_kernels: bool = True):
        self.graphs: list[Graph] = []
        self._compile_kernels = compile_kernels
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Lowering:
        import torch._functorch.config
        import torch._inductor.config
        from torch._inductor import compile_fx, graph, ir, scheduler
        from torch._inductor.codegen.triton import TritonScheduling
        from torch._inductor.fx_passes import joint_graph
        from torch._inductor.runtime import triton_helpers
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
        from triton.runtime import driver

        with tensors_of_numbers():
            joint_graph.lazy_init(rehearsal.CARD)  # patterns that inductor looks for, with numbers in them
        enter = self._stack.enter_context
        enter(torch._inductor.config.patch(force_disable_caches=True, compile_threads=1, use_static_triton_launcher=False))
        enter(torch._functorch.config.patch(enable_autograd_cache=False))
        lower, define, extern = compile_fx._compile_fx_inner, TritonScheduling.define_kernel, scheduler.Scheduler.codegen_extern_call
        load = graph.GraphLowering.compile_to_module

        def lowered(module, inputs, **kwargs):
            self.graphs.append(Graph(_region()))
            plain = copy.deepcopy(module)  # inductor rewrites it
            made = lower(module, inputs, **kwargs)
            made.current_callable = lambda values: plain(*values)
            return made

        def defined(scheduling, source, nodes, kernel):
            name = define(scheduling, source, nodes, kernel)
            self.graphs[-1].calls.append(_triton_call(name, nodes, kernel))
            return name

        def called(schedule, node):
            if (call := _extern_call(node)) is not None:
                self.graphs[-1].calls.append(call)
            return extern(schedule, node)

        def loaded(lowering):
            module = load(lowering)
            self.graphs[-1].parts.update((part.get_name(), whole.get_name()) for whole in lowering.buffers
                                         if isinstance(whole, ir.ConcatKernel) for part in whole.inputs)
            return module

        def compiled(autotuner, *_, **__):
            if self._compile_kernels:
                autotuner._precompile_worker()
                self.graphs[-1].kernels[autotuner.inductor_meta["kernel_name"]] = _usage(autotuner.compile_results)
        for owner, name, function in ((compile_fx, "_compile_fx_inner", lowered), (TritonScheduling, "define_kernel", defined),
                                      (scheduler.Scheduler, "codegen_extern_call", called),
                                      (graph.GraphLowering, "compile_to_module", loaded), (CachingAutotuner, "precompile", compiled),
                                      (triton_helpers, "set_driver_to_gpu", lambda: driver.set_active(NoDriver()))):
            enter(mock.patch.object(owner, name, function))
        driver.set_active(NoDriver())
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()


def _region() -> str:
    """The class of the block that is compiled: the name of its entry function, without its number (see torch_compiler._entry)."""
    names = [code.co_name for code in torch._guards.TracingContext.get().traced_code or ()]
    return next((name.rpartition("_")[0] for name in names if re.fullmatch(r"\w+_\d+", name)), "")


def _hint(expression) -> int:
    from torch._inductor.virtualized import V

    return int(V.graph.sizevars.optimization_hint(expression))


def _described(node) -> tuple[str, int]:
    """Type and sizes of an IR node, and its bytes."""
    sizes = [_hint(size) for size in node.get_size()]
    return (f"{str(node.get_dtype()).removeprefix('torch.')}{sizes}".replace(" ", ""),
            math.prod(sizes) * node.get_dtype().itemsize)


def _triton_call(name: str, nodes, kernel) -> Call:
    from torch._inductor.codegen.common import RemovedArg
    from torch._inductor.scheduler import BaseSchedulerNode
    from torch._inductor.virtualized import V

    reads, writes = {}, {}
    for node in nodes:
        if isinstance(node, BaseSchedulerNode):
            for found, deps in ((reads, node.read_writes.reads), (writes, node.read_writes.writes)):
                for dep in deps:
                    found.setdefault(dep.name, set()).add(dep.normalize() if hasattr(dep, "normalize") else dep)
    args = kernel.args
    passed = {buffer for table in (args.input_buffers, args.output_buffers) for buffer, inner in table.items()
              if not isinstance(inner, RemovedArg)}
    for inplace in args.inplace_buffers.values():
        if not isinstance(inplace, RemovedArg):
            passed.update(inplace.other_names)

    def moved(buffer: str, deps) -> tuple[str, int]:
        text, size = _described(V.graph.get_buffer(buffer) if buffer not in V.graph.graph_inputs else V.graph.graph_inputs[buffer])
        return text, min(size, sum(_hint(dep.numbytes_hint()) for dep in deps))
    # What is in both is made inside, or changed in place under the same name.
    return Call(name, "triton", {b: moved(b, deps) for b, deps in reads.items() if b in passed and b not in writes},
                {b: moved(b, deps) for b, deps in writes.items() if b in passed and b not in V.graph.removed_buffers})


def _extern_call(scheduled) -> Call | None:
    from torch._inductor import ir

    node = scheduled.node
    if isinstance(node, ir.MultiOutput):
        return None  # a part of what the call before it wrote
    name = str(getattr(node, "op_overload", None) or getattr(node, "python_kernel_name", "") or type(node).__name__)
    reads = {tensor.get_name() + f"#{i}" * (i > 0 and any(other.get_name() == tensor.get_name() for other in node.inputs[:i])):
             _described(tensor) for i, tensor in enumerate(node.inputs) if hasattr(tensor, "get_size")}
    writes = {}
    for buffer in scheduled.get_outputs():
        parts = [user.node.node for user in buffer.users if isinstance(getattr(user.node, "node", None), ir.MultiOutput)]
        for part in parts or [buffer.node]:
            if isinstance(part.layout, ir.Layout):
                writes[part.get_name()] = _described(part)
    shapes = [[_hint(size) for size in tensor.get_size()] for tensor in node.inputs if hasattr(tensor, "get_size")]
    kind, operations = "other", 0
    if "int8_gemm" in name:
        kind, operations = "int8 gemm", 2 * math.prod(shapes[0]) * shapes[2][0]
    elif "quant_rows" in name:
        kind = "quantizer"
    elif "attention" in name:
        kind, operations = "attention", 4 * math.prod(shapes[0]) * shapes[1][-2]
    elif "rope" in name:
        kind = "rope"
    elif "mm" in name:
        kind, (left, right) = "gemm", shapes[-2:]
        operations = 2 * math.prod(left) * right[-1]
    return Call(name, kind, reads, writes, operations)


def _usage(results) -> list[dict]:
    """What the cubin of each launch takes: registers and bytes of stack a thread, bytes of shared memory a program; and its size."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = []
    for result in results:
        cubin = result.kernel.asm["cubin"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(cubin)
            text = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{what}:(\d+)", text).group(1)) for what in ("REG", "STACK"))
        found.append({"registers": registers, "stack": stack, "shared": result.kernel.metadata.shared, "bytes": len(cubin),
                      "arch": result.kernel.metadata.target.arch})
    return found


def quantized(model: torch.nn.Module) -> None:
    """The layers that INT8 Quantize Model takes become what it makes of them (ConvRot), with fake values."""
    from int8_compile.compile.comfyui import int8_layer, int8_model
    from int8_compile.int8.plan import LayerPlan
    from int8_compile.int8.quantize import eligible_linears

    def quantize_weight(weight, rotate):
        n, k = weight.shape
        return weight.new_empty((n, k), dtype=torch.int8), weight.new_empty((n, 1), dtype=torch.float32), GROUP if rotate else 0
    int8_layer._connect_kernels()
    int8_layer.patch_linear_input_act()
    layers = {}
    with mock.patch.object(int8_layer, "quantize_weight", quantize_weight):  # asks for values
        for name in eligible_linears(model):
            layer = model.get_submodule(name)
            layers[int8_layer.PREFIX + name] = int8_layer._int8_layer(layer.weight, layer.bias, LayerPlan(name, "convrot"), "auto",
                                                                   rehearsal.CARD, rehearsal.CARD, torch.bfloat16)
    int8_model._share_inputs(layers)
    for name, layer in layers.items():
        model.set_submodule(name.removeprefix(int8_layer.PREFIX), layer)


def flux(width: int):
    """Flux with two blocks of each class, which is what makes them a class to the engine, and a call of it."""
    model = tiny_models.flux(2, 2, "cuda", width, torch.bfloat16)
    return model, lambda pixels, text: dict(
        x=torch.empty(1, 16, pixels // 8, pixels // 8, dtype=torch.bfloat16, device="cuda"),
        timestep=torch.empty(1, dtype=torch.bfloat16, device="cuda"),
        context=torch.empty(1, text, 4096, dtype=torch.bfloat16, device="cuda"),
        y=torch.empty(1, 2048, dtype=torch.bfloat16, device="cuda"), guidance=torch.empty(1, dtype=torch.bfloat16, device="cuda"),
        transformer_options={})


def wan(width: int):
    """Wan, whose q, k and v are three layers."""
    model = tiny_models.wan(2, "cuda", width, 4 * width, torch.bfloat16)
    return model, lambda pixels, text: dict(
        x=torch.empty(1, 16, 1, pixels // 8, pixels // 8, dtype=torch.bfloat16, device="cuda"),
        timestep=torch.empty(1, dtype=torch.bfloat16, device="cuda"),
        context=torch.empty(1, text, 4096, dtype=torch.bfloat16, device="cuda"), transformer_options={})


FAMILIES = {"flux": flux, "wan": wan}


def lower(family: str, weights: str, width: int, pixels: int, text: int, compile_kernels: bool = True) -> tuple[list[Graph], object]:
    """The graphs of family's blocks, and the engine's report. Torch must answer as on a card (see prepare)."""
    from int8_compile.compile import arguments, backend, engine
    from int8_compile.compile.options import CompileOptions
    from torch._subclasses.fake_tensor import FakeTensorMode

    def memory(tensor):
        return tensor.untyped_storage()._cdata
    with (FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), Lowering(compile_kernels) as lowering,
          mock.patch.object(arguments, "_memory", memory),  # those of fake tensors are all at the address 0
          mock.patch.object(backend, "replaced_operators", list)):  # attention is (see prepare), for the card's sake
        model, inputs = FAMILIES[family](width)
        model.eval().requires_grad_(False)
        if weights == "int8":
            quantized(model)
        arguments = inputs(pixels, text)
        compiled = engine.CompiledModule(CompileOptions(mark_sizes=True, dynamic=True), rehearsal.CARD)  # as INT8 Lazy Torch Compile does
        compiled.run(model, lambda: model(**arguments), filter_guards=True, passthrough=lambda error: True)
    return lowering.graphs, compiled.report


def prepare(card: str):
    """This process is on card from now on, with ComfyUI and the pack loaded. Returns what must be kept alive."""
    os.environ.pop("TRITON_INTERPRET", None)
    rehearsal.answer(rehearsal.CARDS[card])
    kept = attention_as_on_a_card()
    sys.path.insert(0, str(find_comfyui()))
    import comfy.cli_args

    comfy.cli_args.args.use_pytorch_cross_attention = True
    load_pack()
    return kept


def check(graphs: list[Graph], report) -> None:
    """One graph for each class of blocks; no input is quantized twice."""
    assert not report.failure and not report.breaks and not report.fallbacks, report
    assert [graph.region for graph in graphs] == [name for name, _ in report.regions] and report.graphs == len(graphs), report
    for graph in graphs:
        inputs = [next(iter(call.reads)) for call in graph.calls if call.kind == "quantizer"]
        assert len(set(inputs)) == len(inputs), f"{graph.region} quantizes {Counter(inputs).most_common(1)} more than once"


def lower_all(card: str, every_weights: Sequence[str], family: str, width: int, pixels: int, text: int, compile_kernels: bool) -> dict:
    """{weights: {class: graph}}, and how long it took."""
    kept = prepare(card)
    found = {"target": card, "arch": cards.CARDS[card].arch, "weights": {}}
    for weights in every_weights:
        start = time.perf_counter()
        graphs, report = lower(family, weights, width, pixels, text, compile_kernels)
        check(graphs, report)
        found["weights"][weights] = {"seconds": round(time.perf_counter() - start, 1),
                                     "blocks": {graph.region: dataclasses.asdict(graph) for graph in graphs}}
    del kept
    return found


def graphs_of(lowered: dict, weights: str) -> dict[str, Graph]:
    """{class: graph} of what lower_all returned."""
    return {name: Graph(name, [Call(**call) for call in graph["calls"]], graph["kernels"], graph["parts"])
            for name, graph in lowered["weights"][weights]["blocks"].items()}


def milliseconds(graphs: dict[str, Graph], depth: dict[str, int], card: cards.Card, by: Callable = lambda call: call.kind) -> Counter:
    """At least, of all blocks of a step, by kind of call."""
    found = Counter()
    for name, graph in graphs.items():
        for call in graph.calls:
            found[by(call)] += depth[name] * call.seconds(card) * 1e3
    return found


def passed_on(graphs: dict[str, Graph], depth: dict[str, int]) -> Counter:
    """{(who writes, who reads): bytes a step} of tensors that go through memory from one call to another: what one kernel for the two
    would not move. The write counts where nobody else reads it."""
    found = Counter()
    for name, graph in graphs.items():
        whole = {part: graph.parts.get(part, part) for call in graph.calls for part in (*call.reads, *call.writes)}
        readers: dict[str, list] = {}
        for call in graph.calls:
            for tensor, (_, size) in call.reads.items():
                readers.setdefault(whole[tensor].partition("#")[0], []).append((call, size))
        for call in graph.calls:
            for tensor, (_, written) in call.writes.items():
                reading = readers.get(whole[tensor], [])
                for reader, size in reading:
                    moved = min(size, written) + (written if len({id(other) for other, _ in reading}) == 1 else 0)
                    found[short(call), short(reader)] += depth[name] * moved
    return found


def short(call: Call) -> str:
    if call.kind not in ("triton", "other"):
        return call.kind
    name = re.sub(r"^triton_\w{3}_fused_|_\d+$", "", call.name)
    words = ("gelu", "native_layer_norm", "rms_norm", "silu", "cat", "copy_", "transpose")
    label = {"native_layer_norm": "layer norm, modulation", "rms_norm": "RMS norm", "copy_": "gate, residual", "transpose": "transpose"}
    return " + ".join(label.get(word, word) for word in words if word in name and not (word == "cat" and "gelu" not in name)
                      and not (word == "transpose" and "gelu" in name)) or "copy of v" * ("flash" in name) or name


def row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def heading(*cells: str) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def table(found: dict) -> str:
    """The page of results: found as gather makes it."""
    last = next(target for target in found["targets"] if target["target"] == MEASURED_CARD)
    size = f"{found['pixels']}x{found['pixels']} pixels, {found['text']} tokens of text"
    return "\n".join([
        "# Flux's blocks as inductor lowers them, and the least time that they take", "",
        f"`python benchmarks/lowered_blocks.py`, {found['date']}, torch {found['torch']}, Triton {found['triton']}, ComfyUI "
        f"{found['comfyui']}, on a machine without a GPU: width {found['width']}, {size}, batch 1. Every Triton kernel was compiled to a "
        "cubin. A call takes at least its bytes over the card's bandwidth or its operations over its rate, whichever is more (rates: "
        "`benchmarks/gpu/cards.py`); launches take nothing, and no tensor stays in a cache from one call to the next.", "",
        "## A step of 19 double and 38 single blocks, at least", "", *_steps(found), "",
        "## Held against a profile", "",
        f"{MEASURED_CARD}, {MEASURED_STEPS} steps of 4 double and 8 single blocks: busy milliseconds of the GPU as measured on "
        "2026-11-26, before norms, GELU and residuals went into INT8 operations, beside the "
        "least that they can be. The rest of the model is in what was measured. An H100's cache (50 MB) keeps some of what the small "
        "kernels pass on.", "", *_against_profile(last), "",
        "## A block", "", *_blocks(found), "",
        "## What passes through memory between two calls, INT8", "",
        "Bytes of a step that one kernel for both calls would not move, and their time at the card's bandwidth. (A tensor that others "
        "read too would still be written.)", "", *_passed_on(last), "",
        "## Where torch ends without a GPU", "", *LIMITS, *_calls(last), ""])


def _steps(found: dict) -> list[str]:
    lines = heading("card", "lowered for", "bf16 ms", "INT8 ms", "ratio", *(f"INT8: {KINDS.get(kind, kind)}" for kind in PARTS))
    for target in found["targets"]:
        for name in TARGETS[target["target"]]:
            bf16, int8 = (milliseconds(graphs_of(target, weights), DEPTH, cards.CARDS[name]) for weights in WEIGHTS)
            lines.append(row(name, f"sm_{target['arch']}", f"{bf16.total():.1f}", f"{int8.total():.1f}",
                             f"{bf16.total() / int8.total():.2f}", *(f"{int8[kind]:.1f}" for kind in PARTS)))
    return lines


def _against_profile(target: dict) -> list[str]:
    lines = heading("", "measured", "at least", "measured / least")
    for weights, measured in MEASURED.items():
        graphs = graphs_of(target, weights)
        least = milliseconds(graphs, MEASURED_DEPTH, cards.CARDS[MEASURED_CARD])
        least["all"] = least.total()
        least = {**milliseconds(graphs, MEASURED_DEPTH, cards.CARDS[MEASURED_CARD], by=short), **least}
        for kind, value in measured.items():
            predicted = MEASURED_STEPS * least[kind]
            lines.append(row(f"{weights}, compiled: {KINDS.get(kind, kind)}", value, f"{predicted:.1f}", f"{value / predicted:.2f}"))
    return lines + [row(name, value, "", "") for name, value in MEASURED_OTHERS.items()]


def _blocks(found: dict) -> list[str]:
    lines = heading("lowered for", "weights", "block", "graphs", "calls", "Triton kernels (cubins)", "most registers", "that spill",
                    "quantizers", "products", "MB moved", "Gop", "least us")
    for target in found["targets"]:
        card = cards.CARDS[target["target"]]
        for weights in WEIGHTS:
            for name, graph in graphs_of(target, weights).items():
                calls, kinds = graph.calls, Counter(call.kind for call in graph.calls)
                cubins = [cubin for kernel in graph.kernels.values() for cubin in kernel]
                lines.append(row(f"sm_{target['arch']}", weights, name, 1, len(calls), f"{kinds['triton']} ({len(cubins)})",
                                 max((cubin["registers"] for cubin in cubins), default=""), sum(cubin["stack"] > 0 for cubin in cubins),
                                 kinds["quantizer"], kinds["gemm"] + kinds["int8 gemm"], round(sum(call.bytes for call in calls) / 1e6),
                                 round(sum(call.operations for call in calls) / 1e9),
                                 round(sum(call.seconds(card) for call in calls) * 1e6)))
    return lines


def _passed_on(target: dict) -> list[str]:
    lines = heading("writes", "reads", "GB a step", *(f"ms, {name.removeprefix('NVIDIA ')}" for name in SHOWN))
    return lines + [row(writer, reader, f"{size / 1e9:.1f}", *(f"{size / cards.CARDS[name].bandwidth * 1e3:.1f}" for name in SHOWN))
                    for (writer, reader), size in passed_on(graphs_of(target, "int8"), DEPTH).most_common(12)]


def _calls(target: dict) -> list[str]:
    """Which call reads and writes what, in order."""
    lines = []
    for weights in WEIGHTS:
        for name, graph in graphs_of(target, weights).items():
            lines += ["", f"## {name}, {weights}, sm_{target['arch']}", "",
                      *heading("call", "reads", "writes", "MB", "Gop", "least us")]
            for call in graph.calls:
                tensors = ["<br>".join(f"{tensor.partition('#')[0]} {text}" for tensor, (text, _) in side.items())
                           for side in (call.reads, call.writes)]
                lines.append(row(f"`{call.name}`", *tensors, f"{call.bytes / 1e6:.1f}", f"{call.operations / 1e9:.1f}",
                                 f"{call.seconds(cards.CARDS[target['target']]) * 1e6:.1f}"))
    return lines


def gather(options) -> dict:
    """What each target's own process says: what torch is told stays so in a process."""
    import triton

    comfyui = find_comfyui()
    found = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "triton": triton.__version__,
             "comfyui": runpy.run_path(str(comfyui / "comfyui_version.py"))["__version__"], "family": options.family,
             "width": options.width, "pixels": options.pixels, "text": options.text, "targets": []}
    for target in TARGETS:
        arguments = [sys.executable, __file__, "--card", target]
        for name in ("family", "width", "pixels", "text"):
            arguments += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(arguments + ["--no-cubins"] * options.no_cubins, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{target}:\n{done.stderr[-5000:]}")
        found["targets"].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--read", type=Path, help="lower nothing: the table of what --json has written")
    parser.add_argument("--family", choices=FAMILIES, default="flux")
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--no-cubins", action="store_true", help="lower only")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS, help="with --card")
    parser.add_argument("--card", choices=TARGETS, help="lower for this one, here, and print JSON")
    options = parser.parse_args()
    if options.card:
        print(json.dumps(lower_all(options.card, options.weights, options.family, options.width, options.pixels, options.text,
                                   not options.no_cubins)))
        return
    found = json.loads(options.read.read_text()) if options.read else gather(options)
    if options.json:
        options.json.write_text(re.sub(r'(\{"name": |"triton_\w+": \[)', r"\n\1", json.dumps(found)) + "\n")
    if options.table:
        options.table.write_text(table(found))
    print(table(found).partition("\n## DoubleStreamBlock")[0])


if __name__ == "__main__":
    main()
