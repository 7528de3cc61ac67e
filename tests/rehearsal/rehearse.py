"""The pack on a card that is not there, in a process of its own: every step of it that asks about CUDA or acts on it. Prints JSON.

    TRITON_INTERPRET=1 python tests/rehearsal/rehearse.py --card "NVIDIA H100 80GB HBM3" --work FOLDER
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(Path(__file__).parent)]
import card as cards  # noqa: E402
import torch  # noqa: E402
import visits  # noqa: E402

from benchmarks.comfy_server import find_comfyui  # noqa: E402
from benchmarks.gpu.kernels import interpreter_of_today  # noqa: E402
from benchmarks.wrapper_overhead import load_pack  # noqa: E402

CUDA, CPU = cards.CARD, cards.CPU
STEPS: dict = {}
COMFY_STEPS: dict = {}


def step(function):
    STEPS[function.__name__] = function
    return function


def comfy_step(function):
    COMFY_STEPS[function.__name__] = function
    return function


def has_triton() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


def close(got: torch.Tensor, want: torch.Tensor, limit: float = 0.04):
    assert got.device == CUDA, got.device
    error = ((got.cpu().double() - want.double()).norm() / want.double().norm()).item()
    assert error < limit, f"off by {error:.2%}"


def layer(m: int, k: int, n: int, dtype=torch.bfloat16, group: int = 0, scalar: bool = False, bias: bool = True):
    """Random (x, qweight, weight_scale, bias) on the card with outliers in x, and x @ weight.T + bias in float64."""
    from int8_compile.int8 import hadamard

    x, weight = torch.randn(m, k), torch.randn(n, k) / k ** 0.5
    x[:, :2] *= 8
    rotated = hadamard.rotate(weight, group)
    scale = rotated.abs().amax() / 127 if scalar else rotated.abs().amax(1, keepdim=True) / 127
    qweight = torch.round(rotated / scale).to(torch.int8)
    b = torch.randn(n) if bias else None
    x = x.to(dtype)
    want = x.double() @ hadamard.rotate(qweight.double() * scale, group).t() + (0 if b is None else b)
    return x.to(CUDA), qweight.to(CUDA), scale.to(CUDA), None if b is None else b.to(dtype).to(CUDA), want


@step
def every_kernel_multiplies_right(state):
    from int8_compile.int8.kernels import autotune, ops, reference

    autotune.CHOICE_RUNS = 1  # the interpreter is slow
    autotune.waiting.busy = lambda: True  # this thread measures
    for kernel in ("auto", "torch", "reference", *(["triton"] if has_triton() else [])):
        for i, (m, k, n) in enumerate(((1, 256, 48), (17, 256, 64), (33, 96, 33))):
            dtype = (torch.bfloat16, torch.float16, torch.float32)[i]
            group = 256 if k == 256 and i else 0
            x, qweight, scale, bias, want = layer(m, k, n, dtype, group, scalar=i == 1, bias=i != 2)
            close(ops.int8_linear(x, qweight, scale, bias, group, kernel=kernel), want)
    for act in reference.ACTIVATIONS:
        x, qweight, scale, bias, _ = layer(5, 128, 32)
        x = torch.cat((x, x), 1) if act == "swiglu" else x
        want = reference.activation(x.cpu().double(), act) @ (qweight.cpu().double() * scale.cpu()).t() + bias.cpu()
        close(ops.int8_linear(x, qweight, scale, bias, act=act), want)
    assert ops.int8_linear(x[:0], qweight, scale, bias, act=act).shape == (0, 32)
    autotune.waiting.measure()
    if has_triton():
        assert not len(autotune.waiting)
        choices = json.loads((Path(os.environ["INT8_COMPILE_CACHE_DIR"]) / "choices.json").read_text())
        assert choices and all(key.startswith(f"{state.card.name} | {autotune.stack()} | ") for key in choices)
        assert state.calls["_sleep"] and state.calls["synchronize"]


@step
def layers_of_a_processor_are_as_before(state):
    from int8_compile.int8.kernels import autotune, ops, reference, torch_mm, triton_gemm, triton_quant, with_triton

    x, qweight, scale, bias, want = layer(20, 128, 32)
    close(ops.int8_linear(*(t.cpu() for t in (x, qweight, scale, bias))).to(CUDA), want)
    assert with_triton.triton_unavailable(CPU) and ops.implementation("auto", CPU) is not torch_mm
    q, _ = reference.quant_rows(x.cpu())
    assert not autotune.is_captured(q) and "comfy_kitchen" not in autotune.candidates(q, qweight.cpu()) and triton_gemm.card(CPU)[1] is None
    got, _ = triton_quant.quant_rows(x.cpu(), 64)
    want, _ = reference.quant_rows(x.cpu(), 64)
    assert (got - want).abs().max() <= 1
    assert ops.implementation("auto", torch.device("mps")).__name__.endswith("reference")


@step
def nothing_is_measured_while_a_graph_is_captured(state):
    from int8_compile.int8 import shared_input
    from int8_compile.int8.kernels import autotune, ops
    from int8_compile.int8.shared_input import share_inputs

    x, qweight, scale, bias, want = layer(33, 128, 48)
    state.capturing, before = True, dict(state.calls)
    try:
        close(ops.int8_linear(x, qweight, scale, bias), want)
        assert state.calls.get("_sleep") == before.get("_sleep")
        siblings = [torch.nn.Module(), torch.nn.Module()]
        shared_input.TRUSTED = ""
        for module in siblings:
            module.shared_input, module.shares_input = None, None
        share_inputs([("a.q", siblings[0], ()), ("a.k", siblings[1], ())])
        for module in siblings:
            module.shared_input.quant_rows(module, x, 0, "none", None, "auto")
        assert siblings[1].shares_input is None
    finally:
        state.capturing = False
    for source in (x, x.cpu()):
        for module in siblings:
            module.shares_input = None
            module.shared_input.quant_rows(module, source, 0, "none", None, "auto")
        assert siblings[1].shares_input is True
    if has_triton():
        assert autotune.candidates(x.to(torch.int8), qweight)


@step
def what_measures_times_by_the_cards_clock(state):
    from int8_compile.int8.kernels import autotune

    assert autotune.card(CUDA) == state.card.name and autotune.card(CPU) == "cpu"
    for device in (CUDA, CPU):
        seconds = autotune.timer(device)(lambda device=device: torch.zeros(3, device=device))
        assert 0 < seconds < 1


@step
def a_table_serves_its_card(state):
    from int8_compile.int8.kernels import autotune, tables
    from int8_compile.int8.kernels.tuning import Choices

    if not has_triton():
        return
    _, qweight, scale, bias, _ = layer(40, 64, 48)
    q, s = torch.randint(-9, 9, (40, 64), dtype=torch.int8, device=CUDA), torch.rand(40, device=CUDA)
    found, shape = autotune.candidates(q, qweight, None), autotune.shape_key(q, qweight, torch.bfloat16)
    folder = Path(os.environ["INT8_COMPILE_CACHE_DIR"]) / "tables"
    for name in found:
        tables.save(folder, autotune.card(CUDA), autotune.stack(), {}, {shape: name})
        key = tables.key(autotune.card(CUDA), autotune.stack(), shape)
        chosen = autotune.choose(Choices(None, tables.load(folder)), key, found, (q, s, qweight, scale, bias, torch.bfloat16))
        assert chosen == name


@step
def comfy_kitchen_is_a_candidate_where_it_agrees(state):
    """Its library is called with the operands that each version takes; a version that wants others is left out."""
    from comfy_kitchen.backends import cuda
    from int8_compile.int8.kernels import autotune, comfy_kitchen_gemm, reference, torch_mm

    taken = []

    def library(bias_type, wrong=False):
        """bias_type: fp32 in 0.2.31; None for the output's, as in 0.2.40, which reads whatever it gets as that."""
        def cutlass_int8_dequant(q, w, s, ws, bias, y, code, stream):
            assert s.shape == (q.shape[0], 1) and ws.shape == (w.shape[0],) and stream == state.stream.cuda_stream
            assert code == cuda.DTYPE_TO_CODE[y.dtype]
            assert not [t for t in (q, w, s, ws, bias, y) if t.data_ptr() % 16 or not t.is_contiguous()]
            taken.append(bias.dtype)
            if bias.numel():  # read as what the library takes it for, to an end that may not be its own
                room = torch.cat((bias.view(torch.uint8), torch.zeros(4 * w.shape[0], dtype=torch.uint8)))
                bias = room.view(bias_type or y.dtype)[:w.shape[0]]
            y.copy_(reference.int8_gemm(q, s[:, 0], w, ws, bias if bias.numel() else None, y.dtype) + wrong)
            return True
        return mock.Mock(spec=["cutlass_int8_dequant"], cutlass_int8_dequant=cutlass_int8_dequant)
    _, qweight, scale, bias, _ = layer(65, 512, 96)
    arguments = (torch.randint(-9, 9, (65, 512), dtype=torch.int8, device=CUDA), torch.rand(65, device=CUDA), qweight, scale, bias,
                 torch.bfloat16)
    available = {"cuda": {"available": True, "disabled": False}}
    for bias_type, wrong in ((torch.float32, False), (None, False), (torch.float32, True)):
        taken.clear()
        with mock.patch.multiple(cuda, _C=library(bias_type, wrong), _wrap_for_dlpack=lambda t: t.host), \
                mock.patch("comfy_kitchen.list_backends", lambda: available):
            comfy_kitchen_gemm.why_not.cache_clear()
            comfy_kitchen_gemm.bias_in_fp32.cache_clear()
            reason = comfy_kitchen_gemm.why_not(CUDA)
            in_fp32 = comfy_kitchen_gemm.bias_in_fp32(CUDA)[0]
            assert ("another one" in reason) if wrong else (not reason and in_fp32 == (bias_type is not None)), reason
            if not reason:
                assert taken and "comfy_kitchen" in (autotune.candidates(arguments[0], qweight) if has_triton() else ["comfy_kitchen"])
                close(comfy_kitchen_gemm.int8_gemm(*arguments), torch_mm.int8_gemm(*arguments).cpu())
                halves = *arguments[:4], None, torch.float16
                close(comfy_kitchen_gemm.int8_gemm(*halves), torch_mm.int8_gemm(*halves).cpu())
    with mock.patch("comfy_kitchen.list_backends", lambda: {"cuda": {"available": False, "disabled": True}}):
        comfy_kitchen_gemm.why_not.cache_clear()
        assert "is off" in comfy_kitchen_gemm.why_not(CUDA)
    for cached in (comfy_kitchen_gemm.why_not, comfy_kitchen_gemm.bias_in_fp32):
        cached.cache_clear()


@step
def what_triton_cannot_do_is_said_and_multiplied_otherwise(state):
    from int8_compile.int8.kernels import ops, torch_mm, triton_kernels, with_triton

    def fresh():
        with_triton.triton_unavailable.cache_clear()
        ops.implementation.cache_clear()
        return with_triton.triton_unavailable(CUDA)
    if not has_triton():
        assert "compute capability 8.0 or later" in fresh() and ops.implementation("auto", CUDA) is torch_mm
        return
    assert fresh() == "" and ops.implementation("auto", CUDA) is triton_kernels
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
        assert "not installed" in fresh() and ops.implementation("auto", CUDA) is torch_mm
    with mock.patch.object(triton_kernels, "quant_rows", mock.Mock(side_effect=RuntimeError("Failed to find C compiler"))):
        assert "install a C compiler" in fresh()
    assert fresh() == ""


@step
def the_check_measures_this_card(state):
    from int8_compile.compile.check import facts as check_facts
    from int8_compile.compile.check import machine
    from int8_compile.compile.check.linear_table import QUICK, Shape, Sizes, float_dtypes, has_fp8, kitchen_backends, sizes

    assert sizes("quick", CUDA).layers == list(QUICK)
    facts = {fact.name: fact for fact in check_facts.machine_facts(CUDA)}
    assert state.card.name in facts["GPU"].value and "compute capability {}.{}".format(*state.card.capability) in facts["GPU"].value
    assert facts["GPU"].status == (check_facts.OK if has_triton() else check_facts.WARNING)
    assert has_fp8(CUDA) == (state.card.capability >= (8, 9)) and not has_fp8(CPU)
    assert ("bf16" in float_dtypes(CUDA)) == has_triton()
    with mock.patch.object(check_facts.importlib.util, "find_spec", lambda name: None):
        assert check_facts.triton_fact(CUDA).status == check_facts.MISSING and check_facts.triton_fact(CPU).status == check_facts.OK
    with mock.patch.object(check_facts.platform, "system", lambda: "Windows"), mock.patch.dict(os.environ, CXX="no-such-compiler"):
        assert check_facts.compiler_fact(CUDA).status == check_facts.WARNING != check_facts.compiler_fact(CPU).status
    backends = [name for name in kitchen_backends() if name == "eager"]
    with mock.patch("int8_compile.compile.check.linear_table.kitchen_backends", lambda: backends):
        result = machine.check(CUDA, Sizes([Shape("Tiny", 32, 64, 128)]))
    assert {"int8", "int8 rotated", "int8 torch._int_mm"} <= result.rows[0].milliseconds.keys(), result.rows[0].failed
    assert set(result.rows[0].failed) <= {"fp8"} and result.device == state.card.name
    machine.check(CPU, Sizes([Shape("Tiny", 16, 64, 64)]))
    assert "INT8 kernel" in {check_facts.kernel_fact(torch.device("mps")).name}
    assert list(check_facts.float_dtypes(CPU) if hasattr(check_facts, "float_dtypes") else float_dtypes(CPU))


@step
def a_block_is_traced_for_the_card(state):
    """What the builder does before inductor generates code, which needs the card. (Before dynamo has run in this process.)"""
    from int8_compile.compile.artifacts import call as cache_call
    from int8_compile.compile.artifacts import export as aoti
    from int8_compile.compile.artifacts import job
    from int8_compile.int8.linear import Int8Linear

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = Int8Linear.from_float(torch.randn(64, 32), torch.randn(64))

        def forward(self, x):
            return self.up(torch.nn.functional.silu(x))
    block = Block()
    tensors = [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), "c") for name, t in block.state_dict().items()
               if "comfy_quant" not in name]
    call = cache_call.flatten((torch.zeros(1, 20, 32),), {})
    job = job.BuildSpec("Block", block, [], tensors, call.structure, [("float32", (1, 20, 32), "c")], [], [0], [(0, 1)], "cuda", 1, {})
    with no_mode():
        traced, body = aoti._trace(job)
    devices = {node.meta["val"].device.type for node in traced.program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    assert devices == {"cuda"} and any("int8_gemm" in str(node.target) for node in traced.program.graph.nodes) and body["leaves"]


@step
def cuda_graphs_are_had_or_left_out_with_a_reason(state):
    from int8_compile.compile.artifacts.attention_override import OVERRIDE
    from int8_compile.compile.artifacts.runtime import BlockInfo
    from int8_compile.compile.engine import CompiledModule
    from int8_compile.compile.options import CompileOptions
    from int8_compile.compile.step import Block, RegionState, Step
    from int8_compile.compile.torch_compiler import RegionCode

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x
    plain = CompileOptions(backend="eager")
    assert plain.on_device(CUDA) == (plain, "") and plain.artifact_refusal and not CompileOptions().artifact_refusal
    for options in (CompileOptions(mode="reduce-overhead"), CompileOptions(backend="cudagraphs"),
                    CompileOptions(options='{"triton.cudagraphs": true}')):
        assert options.cuda_graphs and options.artifact_refusal
        each_size = dict(dynamic=False, mark_sizes=False) if options.backend == "cudagraphs" else {}
        assert options.on_device(CUDA) == (dataclasses.replace(options, **each_size), "")
        assert "do not exist on cpu" in options.on_device(CPU)[1]
        state.allocator = "cudaMallocAsync"
        assert "--disable-cuda-malloc" in options.on_device(CUDA)[1] and not options.on_device(CUDA)[0].cuda_graphs
        state.allocator = "native"
    # The blocks run on the CPU: torch's own graphs need a card, what the engine does around them does not.
    for backend, device in (("cudagraphs", CUDA), ("eager", CUDA), ("eager", CPU)):
        net, x = Net(), torch.randn(2, 4)
        engine = CompiledModule(CompileOptions(backend=backend), device)
        with torch.inference_mode(), no_mode():
            got = engine.run(net, lambda net=net, x=x: net(x), filter_guards=True, passthrough=lambda error: False)
            assert not engine.report.failure, engine.report.failure
            assert torch.equal(got, net(x)) and engine.options.backend == backend and engine.report.graphs
    # A graph would repeat another pack's attention without calling it.
    for options in (CompileOptions(mode="reduce-overhead"), CompileOptions(backend="cudagraphs"), plain):
        net, code = Net(), RegionCode("Linear", options.on_device(CUDA)[0])
        block = Block(RegionState("Linear", code), BlockInfo(net.blocks[0]), True, True)
        stands = Step(0, True, False, None).stand_ins(block, net.blocks[0], {OVERRIDE: lambda function, *args, **kwargs: args[0]})
        assert (stands is None) == options.cuda_graphs


@contextlib.contextmanager
def no_mode():
    """Outside of the card's mode, which torch.compile would trace."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


@step
def a_key_of_the_cache_names_the_card(state):
    from int8_compile.compile.artifacts import key as cache_key

    cache_key.machine.cache_clear()
    found, processor = cache_key.machine("cuda", 0), cache_key.machine("cpu", None)
    assert found["gpu"] == state.card.name and found["capability"] == list(state.card.capability) and "gpu" not in processor
    names = {cache_key.group("Block", True, "aoti", [], {}, device, {}) for device in (CUDA, CPU)}
    assert len(names) == 2 and cache_key.settings()["tf32"]


@step
def steps_are_timed_by_the_cards_clock(state):
    from int8_compile.compile.gain import COMPILED, EAGER, CallTimes

    for device in (CUDA, CPU):
        times = CallTimes()
        for kind in (EAGER, COMPILED, ""):
            times.end(times.begin(device), "a size", kind)
        times.begin(device)
        assert times.count("a size", EAGER) == times.count("a size", COMPILED) == 1 and times.gain("a size").calls == (1, 1)


@step
def the_builder_waits_for_the_cards_memory(state):
    from int8_compile.compile.artifacts import builder

    assert builder._has_memory("cuda") and builder._has_memory("cpu")
    free, state.free = state.free, 1 << 30
    assert not builder._has_memory("cuda") and builder._has_memory("cpu")
    state.free = free


@step
def an_artifacts_inputs_are_aligned(state):
    from int8_compile.compile.artifacts import artifact

    for device in (CUDA, CPU):
        source = torch.arange(64, dtype=torch.int8).to(device)
        whole, part = source[source.data_ptr() % 16 and 16 - source.data_ptr() % 16:], source[1:] if not source.data_ptr() % 16 else source
        assert artifact._aligned(whole) is whole
        got = artifact._aligned(part)
        assert (got is part) == (device is CPU) and torch.equal(got.cpu(), part.cpu())


@step
def the_warm_up_loads_what_a_card_needs(state):
    from int8_compile.compile.torch_internals import warmup

    warmup.prepare("cuda")
    assert "torch._inductor.runtime.triton_heuristics" in sys.modules
    warmup.start("cuda")
    warmup.wait(lambda: False)


@comfy_step
def a_model_samples_quantized_and_offloaded(state, comfy, models):
    from int8_compile import nodes as pack


    def run(node, model, **inputs):
        cls = next(cls for cls in pack.NODES if cls.define_schema().node_id == node)
        defaults = {i.id: i.default for i in cls.define_schema().inputs if i.id not in ("model", "after")}
        return cls.execute(model=model, **{**defaults, **inputs})[0]

    def apply(model, memory=0):
        model.unpatch_model(model.offload_device)
        model.patch_model(model.load_device, lowvram_model_memory=memory)
        generator = torch.Generator().manual_seed(3)
        x, context, y = (torch.randn(*shape, generator=generator).to(CUDA) for shape in ((1, 16, 16, 16), (1, 20, 4096), (1, 2048)))
        sigma, guidance = torch.tensor([0.7], device=CUDA), torch.tensor([3.5], device=CUDA)
        options = {"wrappers": model.wrappers}
        return model.model.apply_model(x, sigma, c_crossattn=context, y=y, guidance=guidance, transformer_options=options)
    path = models / "models" / "diffusion_models" / "tiny_flux.safetensors"
    model = comfy.sd.load_diffusion_model(str(path))
    assert model.load_device == CUDA
    with torch.inference_mode():
        eager = apply(model)
        assert eager.device == CUDA and eager.isfinite().all()
        model.unpatch_model(model.offload_device)
        quantized = run("INT8QuantizeModel", model, method="convrot", keep_layers="double_blocks.1.*\nsingle_blocks.*")
        int8 = apply(quantized)
        close(int8, eager.cpu(), 0.2)
        part = max(1, int(0.5 * quantized.model_size()))
        close(apply(quantized, part), int8.cpu())
        assert quantized.model.model_lowvram
        # The card's mode is nothing that dynamo can trace, so what is compiled runs as it is; the wrapper around it is all there.
        close(apply(run("CompileModel", quantized, backend="eager")), int8.cpu())
        assert run("CompileModel", model, backend="cudagraphs") is not model  # recorded on a card only


@comfy_step
def a_model_is_calibrated_when_it_is_sampled(state, comfy, models):
    from int8_compile.compile.comfyui.int8_calibrate import plans, quantize_model
    from int8_compile.int8.options import Int8Options

    model = comfy.sd.load_diffusion_model(str(models / "models" / "diffusion_models" / "tiny_flux.safetensors"))
    keep = ("double_blocks.*", "single_blocks.[12].*", "single_blocks.0.linear1", "single_blocks.0.modulation.*")
    quantized = quantize_model(model, Int8Options(method="smoothquant", keep_layers=keep, kernel="torch"))
    latent = torch.zeros(1, 16, 16, 16)
    conds = [[[torch.randn(1, 20, 4096), {"pooled_output": torch.randn(1, 2048)}]] for _ in range(2)]
    image = comfy.sample.sample(quantized, comfy.sample.prepare_noise(latent, 1), 1, 1.0, "euler", "simple", *conds, latent,
                                disable_pbar=True, seed=1)
    assert image.isfinite().all() and [plan.name for plan in plans(quantized)] == ["single_blocks.0.linear2"]
    assert state.calls["mem_get_info"]
    auto = quantize_model(model, Int8Options(keep_layers=keep, kernel="torch"))
    comfy.sample.sample(auto, comfy.sample.prepare_noise(latent, 1), 1, 1.0, "euler", "simple", *conds, latent, disable_pbar=True, seed=1)
    [plan] = plans(auto)
    float_ms, int8_ms = plan.times  # of this machine
    assert (plan.method == "float") == (float_ms < 0.95 * int8_ms)


@comfy_step
def the_check_says_what_comfyui_offers(state, comfy, models):
    from int8_compile.compile.check.linear_table import Shape, Sizes
    from int8_compile.compile.comfyui import machine_check

    with mock.patch("int8_compile.compile.check.linear_table.kitchen_backends", lambda: ["eager"]):
        result = machine_check.run_check(lambda device: Sizes([Shape("Tiny", 16, 64, 64)]))
    assert result.device == state.card.name and {"ComfyUI", "native INT8", "dynamic VRAM"} <= {fact.name for fact in result.facts}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--card", choices=cards.CARDS, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", default="", help="some of them, with commas between")
    parser.add_argument("--no-comfyui", action="store_true")
    options = parser.parse_args()
    os.environ.update(INT8_COMPILE_CACHE_DIR=str(options.work), INT8_COMPILE_CACHE="0")
    visited = visits.watch()
    state = cards.install(cards.CARDS[options.card])
    cards.kernels_take_cards_tensors()
    load_pack()
    results, seconds = {}, {}
    steps = dict(STEPS)
    comfyui = None if options.no_comfyui else find_comfyui()
    if comfyui:
        sys.path.insert(0, str(comfyui))
        from benchmarks.tiny_models import cache_dir, make_models
        models = make_models(comfyui, cache_dir())

        def bind(function):
            return lambda state: function(state, comfy_of(), models)
        steps.update((name, bind(function)) for name, function in COMFY_STEPS.items())
    with interpreter_of_today():
        for name, function in steps.items():
            if options.steps and name not in options.steps.split(","):
                continue
            start = time.perf_counter()
            try:
                function(state)
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
            seconds[name] = round(time.perf_counter() - start, 1)
    print(json.dumps({"card": options.card, "steps": results, "seconds": seconds,
                      "visited": sorted(visited, key=str), "calls": state.calls}))


def comfy_of():
    """ComfyUI, imported as on the card; comfy_kitchen's libraries need a real one."""
    import comfy_kitchen

    for backend in ("cuda", "triton"):
        comfy_kitchen.disable_backend(backend)
    import comfy.cli_args

    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.sample
    import comfy.sd
    import comfy.utils
    for backend in ("cuda", "triton"):
        comfy_kitchen.disable_backend(backend)
    return comfy


if __name__ == "__main__":
    main()
