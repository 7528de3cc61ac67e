"""Attention as one operation of compiled code: what is called is what eager calls, and other compilers do not see it."""
from __future__ import annotations

import functools
import itertools
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from int8_compile.compile.artifacts import attention
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions

sys.path.insert(0, str(Path(__file__).parent))
from test_right_under_change import cached, exported  # noqa: F401

CALLS = []


def wrap(function):
    """As ComfyUI's wrap_attn."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        kwargs["_inside_attn_wrapper"] = True
        return function(*args, **kwargs)
    return wrapper


@wrap
def heedful(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """Splits its work by numbers that torch.compile cannot trace."""
    CALLS.append((tuple(q.shape), {key: value for key, value in kwargs.items() if key != "_inside_attn_wrapper"}))
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k, v))
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    extra = {key: kwargs[key] for key in ("scale", "enable_gqa") if key in kwargs}
    for rows in range(0, q.shape[2], 5):
        part = mask if mask is None or mask.shape[-2] == 1 else mask[..., rows:rows + 5, :]
        out[:, :, rows:rows + 5] = F.scaled_dot_product_attention(q[:, :, rows:rows + 5], k, v, attn_mask=part, **extra)
    if not torch.isfinite(out.sum()).item():
        raise ValueError("not finite")
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@wrap
def other(q, k, v, heads, mask=None, **kwargs):
    return q + v.mean().item()


attention.add("test:heedful", heedful, frozenset({"transformer_options", "_inside_attn_wrapper"}))


class Block(torch.nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.qkv = torch.nn.Linear(dim, 3 * dim)
        self.out = torch.nn.Linear(dim, dim)

    def forward(self, x, attend, **kwargs):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + self.out(attend(q, k, v, heads=4, **kwargs))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, attend=heedful, **kwargs):
        for block in self.blocks:
            x = block(x, attend, **kwargs)
        return x


class Global(Block):
    def forward(self, x, **kwargs):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + self.out(heedful(q, k, v, 4, **kwargs))


class GlobalNet(Net):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Global() for _ in range(3))

    def forward(self, x, **kwargs):
        for block in self.blocks:
            x = block(x, **kwargs)
        return x


@pytest.fixture(autouse=True)
def inference():
    CALLS.clear()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled(**options):
    return CompiledModule(CompileOptions(backend="eager", mark_sizes=True, **options))


def run(compiled, net, *args, **kwargs):
    return compiled.run(net, lambda: net(*args, **kwargs), filter_guards=True, passthrough=lambda error: False)


def test_one_graph_a_class_serves_all_sizes_and_calls_what_eager_calls():
    net, module = Net(), compiled()
    for batch, tokens in ((2, 10), (2, 13), (3, 7)):
        x = torch.randn(batch, tokens, 32)
        CALLS.clear()
        want = net(x)
        eager = list(CALLS)
        CALLS.clear()
        assert torch.equal(run(module, net, x), want) and CALLS[-3:] == eager
    assert module.report.graphs == 1 and not module.report.breaks, module.report


def test_masks_scales_and_dtypes_reach_it():
    net = Net().bfloat16()
    module, x = compiled(), torch.randn(2, 10, 32).bfloat16()
    for given in ({"mask": torch.randn(2, 1, 10, 10).bfloat16()}, {"scale": 0.1}, {"attn_precision": torch.float32},
                  {"transformer_options": {"a": 1}}, {"low_precision_attention": False}):
        want = net(x, **given)
        (_, eager), CALLS[:] = CALLS[-1], []
        assert torch.equal(run(module, net, x, **given), want), given
        assert CALLS[-1][1] == {key: value for key, value in eager.items() if key != "transformer_options"}
    assert not module.report.breaks and not module.report.failure


@pytest.mark.parametrize("skip_reshape, skip_output_reshape, gqa, masked", itertools.product((False, True), repeat=4))
def test_its_result_is_of_the_shape_that_is_promised(skip_reshape, skip_output_reshape, gqa, masked):
    batch, heads, tokens, keys, dim, value_dim = 2, 4, 7, 9, 8, 6
    shapes = (heads, tokens, dim), (2 if gqa else heads, keys, dim), (2 if gqa else heads, keys, dim if not skip_reshape else value_dim)
    q, k, v = (torch.randn(batch, *shape) for shape in shapes)
    if not skip_reshape:
        q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    mask = torch.randn(batch, 1, tokens, keys) if masked else None
    rest = mask, "test:heedful", "", skip_reshape, skip_output_reshape, None, gqa or None, None
    want = heedful(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape,
                   **({"enable_gqa": True} if gqa else {}))
    got = torch.ops.int8_compile.attention(q, k, v, heads, *rest)
    assert torch.equal(got, want)
    on_meta = torch.ops.int8_compile.attention(*(t.to("meta") for t in (q, k, v)), heads, mask.to("meta") if masked else None, *rest[1:])
    assert (on_meta.shape, on_meta.dtype, on_meta.stride()) == (got.shape, got.dtype, got.stride())


@pytest.mark.rotating
def test_what_is_no_operation_is_traced_as_it_is():
    net, module, x = Net(), compiled(), torch.randn(2, 10, 32)
    for _ in range(2):
        assert torch.equal(run(module, net, x, other), net(x, other))
        assert torch.equal(run(module, net, x, unknown=1), net(x, unknown=1))  # a keyword that the operation has no place for
    assert CALLS[-1][1] == {"unknown": 1} and not module.report.failure


def test_other_compilers_trace_what_they_always_did():
    net, x, seen = Net(), torch.randn(2, 10, 32), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward
    want = run(compiled(), net, x)
    assert torch.equal(torch.compile(net, backend=backend)(x), want)
    assert seen and not any("int8_compile" in name for name in seen)


def test_an_error_in_it_is_the_callers_and_eagers():
    net, module = Net(), compiled()
    x = torch.randn(2, 10, 32)
    run(module, net, x)
    with pytest.raises(ValueError, match="not finite"):
        run(module, net, x * float("nan"))
    assert torch.equal(run(module, net, x), net(x))


def test_while_a_block_is_exported_others_compute_as_before_and_all_is_put_back():
    inner, results = heedful.__wrapped__, []
    q = torch.randn(1, 3, 8)
    with pytest.raises(KeyError), attention.called_as_operation():
        thread = threading.Thread(target=lambda: results.append(heedful(q, q, q, 2)))
        thread.start()
        thread.join()
        on_meta = heedful(*[q.to("meta")] * 3, 2)
        raise KeyError
    assert torch.equal(results[0], heedful(q, q, q, 2)) and on_meta.is_meta
    assert inner in [cell.cell_contents for cell in heedful.__closure__] and not attention.is_tracing()


def test_a_training_step_goes_through_what_is_traced(tmp_path):
    net, module = Net(), compiled()
    with torch.enable_grad():
        for _ in range(2):
            gradients = []
            for call in (net, lambda x: run(module, net, x)):
                x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
                call(x).square().mean().backward()
                gradients.append([x.grad, *(parameter.grad.clone() for parameter in net.parameters())])
                net.zero_grad()
            assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*gradients))
    x = torch.randn(2, 10, 32)
    assert torch.equal(run(module, net, x), net(x)) and not module.report.failure


def test_it_is_kept_and_one_artifact_serves_all_sizes_and_batches(tmp_path):
    net, module = GlobalNet(), cached(tmp_path / "cache")
    run(module, net, torch.randn(1, 10, 32))
    for batch, tokens in ((1, 10), (2, 13), (3, 7), (1, 8)):
        x = torch.randn(batch, tokens, 32)
        CALLS.clear()
        got = run(module, net, x)
        assert [shape for shape, _ in CALLS] == [(batch, tokens, 32)] * 3
        assert (got - net(x)).norm() < 1e-5 * got.norm()
    assert module.report.last_calls == {"artifact": 3, "graph": 0, "eager": 0}, module.report.fallbacks
    again = cached(tmp_path / "cache")
    run(again, GlobalNet(), x)
    assert again.report.last_calls["artifact"] == 3 and len(again.report.artifacts) == 1


def test_another_attention_is_another_artifact(tmp_path, monkeypatch):
    net, x = GlobalNet(), torch.randn(1, 10, 32)
    run(cached(tmp_path / "cache"), net, x)
    monkeypatch.setattr(sys.modules[__name__], "heedful", other)
    module = cached(tmp_path / "cache")
    assert torch.equal(run(module, net, x), net(x)) and module.report.calls["artifact"] == 0


@functools.wraps(heedful)
def wrapped_again(*args, **kwargs):
    """As a pack does that puts something before core's attention: heedful, which it calls, is a wrapper itself."""
    return heedful(*args, **kwargs)


def test_a_wrapper_around_a_wrapper_is_left_as_it_is():
    attention.add("test:wrapped_again", wrapped_again, frozenset({"transformer_options"}))
    assert "test:wrapped_again" not in attention._functions and attention.name_of(heedful) == ""


@pytest.mark.comfy
def test_comfyuis_own_functions_are_operations_and_a_packs_are_not(comfy):
    import comfy.ldm.modules.attention as core
    from int8_compile.compile.comfyui.attention import add_functions

    add_functions()
    names = {name for name in vars(core) if name.startswith("attention_") and callable(getattr(core, name))}
    assert {"attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch"} <= attention._functions.keys() & names
    assert all(attention.function(name) is getattr(core, name).__wrapped__ for name in attention._functions.keys() & names)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", None])
def test_an_error_of_attention_is_raised_as_it_is_and_compile_stays_on(tmp_path, backend):
    net, x = Net(), torch.randn(2, 10, 32)
    module = CompiledModule(CompileOptions(backend=backend, mark_sizes=True)) if backend else cached(tmp_path / "cache")
    for _ in range(2):
        run(module, net, x)
    with pytest.raises(ValueError, match="not finite"):
        run(module, net, x * float("nan"))
    assert torch.equal(run(module, net, x), net(x))
    assert not module.report.failure and module.report.last_calls["eager"] == 0


@pytest.mark.parametrize("given", [{"scale": torch.tensor(0.3)}, {"mask": torch.zeros(1, 10, dtype=torch.float32)}])
def test_what_the_operation_has_no_place_for_is_traced_as_it_is(given):
    net, module, x = Net(), compiled(), torch.randn(2, 10, 32)
    for _ in range(2):
        assert torch.allclose(run(module, net, x, scaled, **given), net(x, scaled, **given), atol=1e-6)
        assert torch.equal(run(module, net, x), net(x))
    assert not module.report.failure


@wrap
def scaled(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, scale=1.0, **kwargs):
    out = q * scale + v
    return out if mask is None else out + mask.sum()


@wrap
def of_values(q, k, v, heads, mask=None, **kwargs):
    return (q.float() @ k.float().transpose(1, 2)).softmax(-1).to(v.dtype) @ v


attention.add("test:scaled", scaled)
attention.add("test:of_values", of_values)


class Mixed(Block):
    def forward(self, x, attend, **kwargs):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + self.out(attend(q, k, v.double(), heads=4).float())


def test_queries_and_values_of_two_dtypes_are_traced_as_they_are():
    net, module, x = Net(), compiled(), torch.randn(2, 10, 32)
    net.blocks = torch.nn.ModuleList(Mixed() for _ in range(3))
    for _ in range(2):
        assert torch.allclose(run(module, net, x, of_values), net(x, of_values), atol=1e-6)
    assert not module.report.failure
