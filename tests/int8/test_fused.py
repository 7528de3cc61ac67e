"""Norm and modulation in the quantizer, gate and residual in the product: the same values as apart, in the kernels of this machine and in
graphs; where a graph does something else with a value, it is left alone."""
import importlib

import pytest
import torch
from int8_compile.int8.kernels import autotune, cpu, ops, reference, seen_right, torch_mm
from int8_compile.int8.kernels.reference import Added, Normed

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
LAYER_NORM = "mean", "rstd", "weight", "bias"
NORMS = {"LayerNorm": LAYER_NORM, "RMSNorm": ("rstd", "weight"), "adaLN": ("mean", "rstd", "factor", "shift"),
         "RMS, modulated": ("rstd", "weight", "factor"), "all": (*LAYER_NORM, "factor", "shift")}


def normed(x, steps, images, dtype):
    """A Normed for rows x with these steps; factor and shift strided, as mod.chunk(6, -1) gives them."""
    k, work = x.shape[1], x.float()
    modulation = torch.randn(images, 6 * k, device=x.device).to(dtype).chunk(6, -1)
    made = {"mean": work.mean(-1), "rstd": (work.var(-1, correction=0) + 1e-6).rsqrt(), "weight": torch.randn(k, device=x.device),
            "bias": torch.randn(k, device=x.device).to(dtype), "factor": modulation[1], "shift": modulation[4]}
    return Normed(**{name: made[name] for name in steps}, plus_one="mean" in steps)


def rows(m, k, dtype, device):
    x = torch.randn(m, k, device=device)
    x[: m // 8] *= 100  # outliers
    return x.to(dtype)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", NORMS.values(), ids=NORMS)
def test_a_norm_in_the_quantizer_is_the_norm_before_it(steps, dtype, device):
    for m, k, images in (1, 64, 1), (6, 48, 2), (6, 1000, 6), (513, 256, 3), (513, 256, 513):
        for group in (0, 16, 64, 256):
            if k % max(group, 1):
                continue
            for smooth in None, torch.rand(k, device=device) + 0.5:
                x = rows(m, k, dtype, device)
                before = normed(x, steps, images, dtype)
                apart = ops.quant_rows(reference.modulated(x.float(), before), group, "none", smooth, "auto")
                for module in (ops.implementation("auto", device), torch_mm):
                    q, s = module.norm_quant_rows(x, before, group, smooth)
                    if module is not torch_mm:
                        assert torch.equal(q, apart[0]) and torch.equal(s, apart[1])
                    assert not seen_right.norm_rows_error(x, before, group, smooth, q, s)


def test_a_norm_of_no_rows_and_of_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(torch_mm, "BLOCK_BYTES", 4 * 64 * 40)
    x = rows(150, 64, torch.float32, "cpu")
    before = normed(x, (*LAYER_NORM, "factor", "shift"), 5, torch.float32)
    for mine, whole in zip(torch_mm.norm_quant_rows(x, before), reference.norm_quant_rows(x, before)):
        assert torch.equal(mine, whole)
    monkeypatch.setattr(cpu.native, "library", lambda: None)
    monkeypatch.setattr(cpu, "QUANT_BLOCK_BYTES", 0)
    for mine, whole in zip(cpu.norm_quant_rows(x, before), reference.norm_quant_rows(x, before)):
        assert torch.equal(mine, whole)
    none = Normed(*(None if each is None else each[:0] for each in before[:2]), *before[2:])
    assert cpu.norm_quant_rows(x[:0], none)[0].shape == (0, 64)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_added_to_a_product_is_added_before_the_cast(dtype, native, monkeypatch):
    if not native:
        monkeypatch.setattr(cpu.native, "library", lambda: None)
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 0)  # blocks of 64 rows
    for m, k, n, images in (1, 64, 48, 1), (6, 64, 80, 2), (150, 64, 48, 5), (150, 64, 48, 0), (150, 64, 48, 150):
        q, s = reference.quant_rows(torch.randn(m, k))
        w, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n, 1) / 100
        for bias in None, torch.randn(n).to(dtype):
            for ws in scale, scale[0]:
                added = Added(torch.randn(m, n).to(dtype), torch.randn(images, 6 * n).to(dtype).chunk(6, -1)[2] if images else None)
                y = cpu.int8_gemm(q, s, w, ws, bias, dtype, added)
                assert torch.equal(y, reference.int8_gemm(q, s, w, ws, bias, dtype, added))
                assert not seen_right.Product((q, s, w, ws, bias, dtype, added)).error(y)
                assert seen_right.Product((q, s, w, ws, bias, dtype, added._replace(residual=1.5 * added.residual))).error(y)


def test_a_wrong_fused_kernel_is_out_at_its_first_call(monkeypatch):
    for table in "_RIGHT", "_WRONG":
        monkeypatch.setattr(seen_right, table, {})
    monkeypatch.setattr(autotune, "_ADDS", {})
    x = rows(32, 64, torch.float32, "cpu")
    before = normed(x, ("mean", "rstd", "factor", "shift"), 2, torch.float32)
    statistics = before.mean.view(2, 16, 1), before.rstd.view(2, 16, 1)
    given = x.view(2, 16, 64), *statistics, None, None, before.factor[:, None], before.shift[:, None]
    right = cpu.norm_quant_rows
    monkeypatch.setattr(cpu, "norm_quant_rows", lambda x, normed, *args: right(x, normed._replace(shift=None), *args))
    q, s = ops.norm_quant_rows(*given, True, 0, None, "auto")
    assert all(map(torch.equal, (q, s), reference.norm_quant_rows(x, before))) and seen_right.is_wrong(x.device, "cpu")

    w, ws, residual = torch.randint(-127, 128, (48, 64), dtype=torch.int8), torch.rand(48, 1), torch.randn(32, 48)
    gate = torch.randn(2, 1, 48)
    want = reference.int8_gemm(q, s, w, ws, None, torch.float32, Added(residual, gate[:, 0]))

    def forgets(*arguments, added=None):
        return reference.int8_gemm(*arguments)
    key = x.device, 32, 64, 48, torch.float32, True
    for _ in range(2):
        y = autotune._add(key, forgets, (q, s, w, ws, None, torch.float32), Added(residual, gate[:, 0]))
        torch.testing.assert_close(y, want)
    assert not any(autotune._ADDS.values()) and len(seen_right.looked_at()[1]) == 2


def test_operands_that_do_not_fit_are_refused():
    q, s = reference.quant_rows(torch.randn(6, 64))
    w, ws = torch.randint(-127, 128, (48, 64), dtype=torch.int8), torch.rand(48, 1)
    with pytest.raises((ValueError, RuntimeError)):
        ops.int8_gemm_added(q, s, w, ws, None, torch.randn(6, 48), torch.randn(4, 1, 48), "float32", "auto")
    with pytest.raises((ValueError, RuntimeError)):
        ops.int8_gemm_added(q, s, w, ws, None, torch.randn(5, 48), None, "float32", "auto")
    for mean, factor in (torch.randn(5, 1), None), (None, torch.randn(4, 1, 64)), (None, torch.randn(1, 63)):
        with pytest.raises((ValueError, RuntimeError)):
            ops.norm_quant_rows(torch.randn(6, 64), mean, None, None, None, factor, None, False, 0, None, "auto")


class Block(torch.nn.Module):
    """x [B, T, K]. how: what is done with it."""

    def __init__(self, how, width=64):
        super().__init__()
        from int8_compile.int8.linear import Int8Linear

        torch.manual_seed(1)
        self.how, self.norm = how, torch.nn.LayerNorm(width, elementwise_affine=how == "affine", eps=1e-6)
        self.first, self.second = (Int8Linear.from_float(torch.randn(width, width) / 8, torch.randn(width)) for _ in range(2))
        self.rms = torch.nn.RMSNorm(width, eps=1e-6)

    def forward(self, x, scale, shift, gate):
        how = self.how
        normed = {"rms": self.rms, "rms one plus": self.rms}.get(how, self.norm)(x)
        if how in ("modulated", "kept", "after", "twice", "full"):
            normed = normed * (1 + scale) + shift
        elif how in ("addcmul", "rms one plus"):
            normed = torch.addcmul(normed, normed, scale) + shift
        y = self.first(normed)
        if how == "after":
            return x + torch.nn.functional.rms_norm(y, y.shape[-1:]) * gate
        if how == "twice":
            return x + gate * y, y
        if how == "kept":
            return x + gate * y + normed
        if how == "full":
            return torch.cat((x, x)) + gate.repeat(2, 1, 1) * torch.cat((y, y))
        x = x + y if how == "plain" else x + gate * y
        activated = torch.nn.functional.gelu(x, approximate="tanh" if how in ("tanh", "tanh, kept") else "none")
        return x + self.second(activated) + (activated if how == "tanh, kept" else 0)


# {what a block does: (quantizers with a norm, with a GELU, products that are added)}
FOUND = {"modulated": (1, 0, 2), "affine": (1, 0, 2), "rms": (1, 0, 2), "rms one plus": (1, 0, 2), "addcmul": (1, 0, 2),
         "plain": (1, 0, 2), "after": (1, 0, 0), "twice": (1, 0, 0), "kept": (0, 0, 1), "full": (1, 0, 0), "tanh": (1, 1, 2),
         "tanh, kept": (1, 0, 2)}


def fused(call, counts, dynamic=True):
    """call, compiled with the pass on its graphs and nothing else. counts: see FOUND, of each graph, filled in."""
    from functorch.compile import make_boxed_func
    from int8_compile.int8.graph_pass import Int8GraphPass
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def passed(module, _):
        Int8GraphPass()(module.graph)
        module.graph.lint()
        module.recompile()
        calls = [(node.target, node.args) for node in module.graph.nodes]
        counts.append((sum(target is ops.norm_quant_rows.default for target, _ in calls),
                       sum(target is ops.quant_rows.default and args[2] == "gelu_tanh" for target, args in calls),
                       sum(target is ops.int8_gemm_added.default for target, _ in calls)))
        return make_boxed_func(module.forward)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=passed, inference_compiler=passed, decompositions=select_decomp_table())
    return torch.compile(call, backend=backend, dynamic=dynamic)


@pytest.mark.parametrize("how, dtype", [*((how, torch.float32) for how in FOUND),
                                        *((how, torch.bfloat16) for how in ("modulated", "rms one plus", "tanh"))], ids=str)
def test_a_graph_computes_the_same_and_only_what_is_only_passed_on_is_fused(how, dtype):
    block, counts = Block(how).to(dtype), []
    call = fused(block.forward, counts)
    with torch.inference_mode():
        for batch, tokens in (2, 10), (2, 24), (3, 24):
            x = torch.randn(batch, tokens, 64).to(dtype)
            given = x, *torch.randn(batch, 1, 3 * 64).to(dtype).chunk(3, -1)
            want, got = block(*given), call(*given)
            for mine, theirs in zip(*(each if isinstance(each, tuple) else (each,) for each in (got, want))):
                # A last bit before rounding to INT8 is a step after it.
                assert mine.dtype == dtype and (mine - theirs).norm() <= (2e-3 if dtype is torch.float32 else 2e-2) * theirs.norm()
    assert set(counts) == {FOUND[how]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_calls_what_is_fused(dtype):
    from int8_compile.int8.graph_pass import Int8GraphPass
    from torch._inductor.utils import run_and_get_code

    block = Block("modulated").to(dtype)
    torch._dynamo.reset()
    call = torch.compile(block.forward, dynamic=True, options={"post_grad_custom_pre_pass": Int8GraphPass()})
    with torch.inference_mode():
        given = torch.randn(2, 10, 64).to(dtype), *torch.randn(2, 1, 3 * 64).to(dtype).chunk(3, -1)
        want, (got, code) = block(*given), run_and_get_code(call, *given)
    assert (got - want).norm() <= (2e-3 if dtype is torch.float32 else 2e-2) * want.norm()
    source = "".join(code)
    assert source.count("int8_compile.norm_quant_rows.default(") == 1 and source.count("int8_compile.int8_gemm_added.default(") == 2


def test_an_addcmul_that_is_in_nothing_stays_one():
    from int8_compile.int8 import fused_graph

    def call(x, y, z):
        return torch.addcmul(torch.addcmul(x, y, z), z, z)
    x, y, z = torch.randn(3, 2, 4, 8)
    graph = torch.fx.experimental.proxy_tensor.make_fx(call)(x, y, z)
    for node, value in zip(graph.graph.nodes, (x, y, z, *[x] * 9)):
        node.meta.setdefault("val", value)
    assert fused_graph.fuse(graph.graph) == (0, 0, 0)
    graph.graph.lint()
    graph.recompile()
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == 2 * [torch.ops.aten.addcmul.default] and torch.equal(graph(x, y, z), call(x, y, z))


def test_nothing_is_fused_where_each_rounding_of_eager_is_asked_for():
    from torch._inductor import config

    block, counts = Block("modulated"), []
    with config.patch(emulate_precision_casts=True), torch.inference_mode():
        fused(block.forward, counts)(torch.randn(2, 10, 64), *torch.randn(2, 1, 3 * 64).chunk(3, -1))
    assert counts == [(0, 0, 0)]


@pytest.mark.parametrize("shape, found", [((4, 1, 64), (1, 0, 2)), ((1, 1, 64), (1, 0, 2)), ((64,), (1, 0, 2)),
                                          ((4, 6, 64), (0, 0, 1)), ((1, 6, 64), (0, 0, 1))], ids=str)
def test_a_factor_for_each_token_is_left_alone(shape, found):
    block, counts, x = Block("modulated"), [], torch.randn(4, 6, 64)
    given = x, *(torch.randn(shape) for _ in range(3))
    with torch.inference_mode():
        got, expected = fused(block.forward, counts)(*given), block(*given)
    assert (got - expected).norm() <= 2e-3 * expected.norm() and counts == [found]


first = Block("modulated").first


def norm(x):
    return torch.nn.functional.layer_norm(x, (64,))


A, B, C = torch.randn(3, 4, 64), torch.randn(3, 1, 64), torch.randn(1, 4, 64)
COLUMN, TURNED = torch.randn(3, 4, 1), torch.randn(4, 3, 64)
# What only looks like a norm in front of a quantizer, or a residual behind a product: an unseen tester's.
LOOKS_ALIKE = {
    "one image, normed, for three": lambda: first(norm(C) * (1 + B) + B), "one image for three, flattened": lambda: first(
        (norm(C) * (1 + B)).reshape(-1, 64)), "x + x * f, broadcast": lambda: first(torch.addcmul(norm(C), norm(C), B)),
    "statistics of more rows": lambda: first((B - COLUMN) * COLUMN), "an outer product": lambda: first((COLUMN * COLUMN) * B[0]),
    "a mask of rows": lambda: first(norm(A) * (COLUMN > 0)), "three times the one": lambda: first(norm(A) * torch.add(B, 1, alpha=3)),
    "double": lambda: first(norm(A.double() + 1e9).float()),
    "through fp8": lambda: first(norm(A).to(torch.float8_e4m3fn).float() * (1 + B)),
    "a product for each image": lambda: A + first(B), "a product for each token": lambda: A + first(C) * B,
    "a product through fp8": lambda: A + first(A).to(torch.float8_e4m3fn).float(), "residual in double": lambda: A.double() + first(A),
    "a product itself": lambda: (lambda y: y + y)(first(A)), "two products": lambda: first(A) * B + first(C),
    "a weight for each image": lambda: first((norm(A) * B + B) * (1 + B) + B), "two factors for each image": lambda: first(norm(A) * B * B),
    "two shifts for each image": lambda: first(norm(A) + B + B), "a factor on a factor": lambda: first(norm(A) * (1 + B) * B),
    "a residual that lies otherwise": lambda: torch.as_strided(A.permute(1, 0, 2) + first(TURNED), (12, 64), (64, 1)),
    "a size": lambda: first(norm(A) * A.shape[1]) * A.shape[1] + A, "no image": lambda: A[:0] + first(norm(A[:0]) * (1 + B[:0])) * B[:0],
    "no token": lambda: A[:, :0] + first(norm(A[:, :0]) * (1 + B)) * B}


@pytest.mark.parametrize("what", LOOKS_ALIKE)
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_only_looks_alike_computes_the_same(what, dynamic):
    call = LOOKS_ALIKE[what]
    torch._dynamo.reset()
    with torch.inference_mode():
        want = call()
        for name in ("A", "B", "C", "COLUMN") if dynamic else ():
            torch._dynamo.maybe_mark_dynamic(globals()[name], 0)
        got = fused(call, [], dynamic)()
    assert got.shape == want.shape and got.dtype == want.dtype and (got - want).norm() <= 2e-3 * want.norm()


def test_images_that_come_last_are_left_alone():
    """x [T, B, K], factor [B, K]: rows of one image are not one after another."""
    block, counts, x = Block("modulated"), [], torch.randn(6, 4, 64)
    given = x, *(torch.randn(4, 64) for _ in range(3))
    with torch.inference_mode():
        got, expected = fused(block.forward, counts)(*given), block(*given)
    assert (got - expected).norm() <= 2e-3 * expected.norm() and counts == [(0, 0, 1)]


def test_the_pass_is_part_of_inductors_key():
    from int8_compile.int8 import fused_graph, graph_pass

    before = graph_pass.Int8GraphPass().uuid()
    assert before == graph_pass.Int8GraphPass().uuid() and importlib.import_module(fused_graph.__name__) is fused_graph
