"""Another pack's attention (optimized_attention_override) is called at run time, as eager calls it; blocks that have one are compiled and
kept like others."""
from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
from int8_compile.compile.artifacts import attention, origins
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions

sys.path.insert(0, str(Path(__file__).parent))
from test_right_under_change import cached, exported  # noqa: F401

pytestmark = pytest.mark.rotating(4)

KEY = "optimized_attention_override"
COMFYUI = origins.COMFYUI


def wrap(function):
    """As ComfyUI's wrap_attn."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "_inside_attn_wrapper" not in kwargs:
            options = kwargs.get("transformer_options")
            kwargs["_inside_attn_wrapper"] = True
            if options is not None and KEY in options:
                return options[KEY](function, *args, **kwargs)
        return function(*args, **kwargs)
    return wrapper


def attend(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@wrap
def plain(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    return attend(q, k, v, heads, mask)


@wrap
def heedful(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    if q.sum().item() != q.sum().item():
        raise ValueError("not a number")
    return attend(q, k, v, heads, mask)


attention.add("override_plain", plain, frozenset({"transformer_options", "_inside_attn_wrapper"}), traced=True)
attention.add("override_heedful", heedful, frozenset({"transformer_options", "_inside_attn_wrapper"}))


class Block(torch.nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def forward(self, x, transformer_options=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + self.out(self.attend(q, k, v, transformer_options))

    def attend(self, q, k, v, options):
        return plain(q, k, v, 4, transformer_options=options)


class Heedful(Block):
    def attend(self, q, k, v, options):
        return heedful(q, k, v, heads=4, mask=None, transformer_options=options)


class Copies(Block):
    def attend(self, q, k, v, options):
        return plain(q, k, v, 4, transformer_options={**options, "mine": 3})


class Writes(Block):
    def attend(self, q, k, v, options):
        options["block_index"] = 7
        return plain(q, k, v, 4, transformer_options=options)


class OwnKeyword(Block):
    def attend(self, q, k, v, options):
        return plain(q, k, v, 4, transformer_options=options, mine=2)


class Net(torch.nn.Module):
    def __init__(self, kind=Block):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(kind() for _ in range(3))

    def forward(self, x, options):
        for index, block in enumerate(self.blocks):
            options["block_index"] = index
            x = block(x, transformer_options=options)
        return x


@pytest.fixture(autouse=True)
def comfyuis_own(monkeypatch):
    """These blocks stand for ComfyUI's own: an override of a pack's is compiled with all guards."""
    monkeypatch.setattr(origins, "COMFYUI", (*origins.COMFYUI, __name__.partition(".")[0]))


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def in_process():
    return CompiledModule(CompileOptions(backend="aot_eager", mark_sizes=True))


def run(compiled, net, x, options):
    return compiled.run(net, lambda: net(x, options), filter_guards=True, passthrough=lambda error: False)


class Pack:
    """Keeps a state, and looks at the block, the step and who calls."""

    def __init__(self):
        self.seen = []

    def __call__(self, function, q, k, v, *args, **kwargs):
        options = kwargs["transformer_options"]
        found = options["block_index"], options.get("sigmas"), options["optimized_attention_override"] is self, options.get("mine")
        self.seen.append((function.__name__, len(args), sorted(kwargs), found))
        factor = 1 + options["block_index"] + (options.get("sigmas") or 0) + len(self.seen) % 2
        return function(q, k, v, *args, **kwargs) * factor


@pytest.mark.rotating
@pytest.mark.parametrize("kind", [Block, Heedful, Copies, Writes, OwnKeyword])
@pytest.mark.parametrize("keep", [True, False])
def test_an_override_gets_what_eager_gives_it_and_comes_and_goes(tmp_path, kind, keep):
    net, compiled = Net(kind), cached(tmp_path / "cache") if keep else in_process()
    for step, name in enumerate(("none", "pack", "pack", "pack", "none", "half", "half", "pack", "none", "pack")):
        x = torch.randn(2, 6 + step, 32)
        packs = Pack(), Pack()
        overrides = {"none": (None, None), "pack": packs, "half": (lambda f, q, *args, **kwargs: q * 0.5,) * 2}[name]
        results = []
        for override, call in zip(overrides, (net, lambda *given: run(compiled, net, *given))):
            options = {"sigmas": step, "cond_or_uncond": [0]} | ({KEY: override} if override else {})
            before = dict(options)
            results.append(call(x, options))
            assert {**options, "block_index": 0} == {**before, "block_index": 0}
        assert torch.allclose(*results, atol=1e-6), (step, name)
        assert packs[0].seen == packs[1].seen
    assert not compiled.report.failure


@pytest.mark.parametrize("kind", [Block, Heedful])
def test_one_graph_a_class_serves_all_overrides_sizes_and_blocks(kind):
    net, compiled = Net(kind), in_process()
    for step in range(5):
        x = torch.randn(2, 6 + step, 32)
        want, got = (call(x, {"sigmas": step, KEY: Pack()}) for call in (net, lambda *given: run(compiled, net, *given)))
        assert torch.allclose(got, want, atol=1e-6)
    assert compiled.report.graphs == 1 and not compiled.report.breaks and compiled.report.last_calls["graph"] == 3


@pytest.mark.parametrize("kind", [Block, Heedful])
def test_blocks_with_an_override_are_kept_apart_from_those_without(tmp_path, kind):
    net, compiled = Net(kind), cached(tmp_path / "cache")
    for options in ({KEY: Pack()}, {}, {KEY: lambda f, q, *args, **kwargs: q * 0.5}, {}, {KEY: Pack()}):
        x = torch.randn(2, 9, 32)
        for _ in range(2):
            want = net(x, {"sigmas": 1, **options, **({KEY: Pack()} if isinstance(options.get(KEY), Pack) else {})})
            assert torch.allclose(run(compiled, net, x, {"sigmas": 1, **options, **(
                {KEY: Pack()} if isinstance(options.get(KEY), Pack) else {})}), want, atol=1e-6)
        assert compiled.report.last_calls["artifact"] == 3
    assert len(compiled.report.artifacts) == 2
    again = cached(tmp_path / "cache")
    assert torch.allclose(run(again, net, x, {"sigmas": 1, KEY: Pack()}), net(x, {"sigmas": 1, KEY: Pack()}), atol=1e-6)
    assert again.report.last_calls["artifact"] == 3


@pytest.mark.parametrize("kind", [Copies, OwnKeyword])
def test_what_an_override_would_not_see_is_not_kept_and_without_one_it_is(tmp_path, kind):
    net, compiled = Net(kind), cached(tmp_path / "cache")
    x = torch.randn(2, 9, 32)
    for _ in range(2):
        run(compiled, net, x, {"sigmas": 1, KEY: Pack()})
        assert compiled.report.last_calls["artifact"] == 0
    for _ in range(2):
        run(compiled, net, x, {"sigmas": 1})
    assert compiled.report.last_calls["artifact"] == 3


class Wrong(Exception):
    pass


@pytest.mark.parametrize("keep", [True, False])
def test_an_overrides_own_error_is_raised_and_the_next_call_is_compiled(tmp_path, keep):
    net, compiled = Net(), cached(tmp_path / "cache") if keep else in_process()
    x, options = torch.randn(2, 9, 32), {"sigmas": 1, KEY: Pack()}

    def fails(*args, **kwargs):
        raise Wrong
    for _ in range(3):
        run(compiled, net, x, {**options, KEY: Pack()})
    failing = {**options, KEY: fails}
    with pytest.raises(Wrong):
        run(compiled, net, x, failing)
    assert failing[KEY] is fails
    assert torch.allclose(run(compiled, net, x, {**options, KEY: Pack()}), net(x, {**options, KEY: Pack()}), atol=1e-6)
    assert compiled.report.last_calls["eager"] == 0 and not compiled.report.failure


@pytest.mark.rotating
@pytest.mark.parametrize("result", [
    lambda q: q, lambda q: q.double(), lambda q: q[:, :1], lambda q: q.unsqueeze(0),
    lambda q: q.transpose(0, 1).contiguous().transpose(0, 1)])
@pytest.mark.parametrize("keep", [True, False])
def test_results_of_any_kind_are_what_eager_makes_of_them(tmp_path, result, keep):
    net, compiled = Net(), cached(tmp_path / "cache") if keep else in_process()
    net = net.double() if result(torch.ones(1, 1)).dtype == torch.float64 else net
    x = torch.randn(1 if result(torch.ones(2, 2, 2)).dim() == 4 else 2, 9, 32, dtype=net.blocks[0].out.weight.dtype)

    def override(function, q, *args, **kwargs):
        return result(q)
    for given in ({KEY: override}, {KEY: Pack()}, {KEY: override}):
        for _ in range(3):
            options = {"sigmas": 1, **given} if KEY in given and given[KEY] is override else {"sigmas": 1, KEY: Pack()}
            want = net(x, dict(options) if options[KEY] is override else {"sigmas": 1, KEY: Pack()})
            assert torch.allclose(run(compiled, net, x, options), want, atol=1e-6)


class Falsy(Pack):
    def __bool__(self):
        return False


@pytest.mark.parametrize("keep", [True, False])
def test_an_override_that_is_false_is_one(tmp_path, keep):
    net, compiled = Net(), cached(tmp_path / "cache") if keep else in_process()
    for kind in (None, Falsy, None, Falsy):
        x = torch.randn(2, 9, 32)
        for _ in range(3):
            want, got = (call(x, {"sigmas": 1, **({KEY: kind()} if kind else {})}) for call in (net, lambda *a: run(compiled, net, *a)))
            assert torch.allclose(got, want, atol=1e-6)
    assert compiled.report.last_calls["artifact" if keep else "graph"] == 3


class WritesMore(Block):
    """As UNets' blocks, which note for patches where they are, and for what size."""

    def attend(self, q, k, v, options):
        options["activations_shape"] = list(q.shape)
        options["kind"], options["sizes"], options["nothing"] = "a text", (q.shape[1], 3), None
        out = plain(q, k, v, 4, transformer_options=options)
        options["block_index"] = options["later"] = 5
        return out + plain(q, k, v, 4, transformer_options=options)


def test_what_a_block_writes_into_its_options_the_override_sees(tmp_path):
    net, compiled, here = Net(WritesMore), cached(tmp_path / "cache"), in_process()

    class Looks(Pack):
        def __call__(self, function, q, k, v, *args, transformer_options, **kwargs):
            self.seen.append({key: value for key, value in transformer_options.items() if key != KEY})
            return function(q, k, v, *args, **kwargs) * (1 + transformer_options.get("later", 0) + transformer_options["block_index"])
    for step, batch in enumerate((2, 2, 3, 1, 1, 2)):
        x = torch.randn(batch, 6 + step, 32)
        results, packs, left = [], (Looks(), Looks(), Looks()), []
        for pack, call in zip(packs, (net, lambda *given: run(compiled, net, *given), lambda *given: run(here, net, *given))):
            options = {"sigmas": step, "kind": "none", KEY: pack}
            results.append(call(x, options))
            left.append({key: value for key, value in options.items() if key != KEY})
        for result, pack, after in zip(results[1:], packs[1:], left[1:]):
            assert pack.seen == packs[0].seen and after == left[0]
            assert torch.allclose(result, results[0], rtol=1e-4)
    assert compiled.report.last_calls["artifact"] == 3, compiled.report.fallbacks


STATE = {"kind": "none"}


class TellsByState(Block):
    def attend(self, q, k, v, options):
        total = 0
        for kind in ("self", "cross"):
            STATE["kind"] = kind
            total = total + plain(q, k, v, 4, transformer_options=options)
        return total


class TellsByItem(Block):
    def attend(self, q, k, v, options):
        total = 0
        for kind in ("self", "cross"):
            options["info"]["kind"] = kind
            total = total + plain(q, k, v, 4, transformer_options=options)
        return total


class Asks(Block):
    def attend(self, q, k, v, options):
        return plain(q, k, v, 4, transformer_options=options) * getattr(options.get(KEY), "gain", 1.0)


class CopiesLater(Block):
    def attend(self, q, k, v, options):
        return plain(q, k, v, 4, transformer_options={**options, "scale": 3.0} if q.shape[1] > 10 else options)


class HasGain:
    gain = 3.0

    def __call__(self, function, q, k, v, *args, transformer_options, **kwargs):
        kind = STATE["kind"] + transformer_options["info"]["kind"]
        factor = {"selfnone": 2.0, "noneself": 2.0}.get(kind, 5.0) * transformer_options.get("scale", 1.0)
        return function(q, k, v, *args, **kwargs) * factor


@pytest.mark.rotating
@pytest.mark.parametrize("kind", [TellsByState, TellsByItem, Asks, CopiesLater, Writes])
@pytest.mark.parametrize("keep", [True, False])
def test_what_a_packs_block_tells_an_override_arrives(tmp_path, monkeypatch, kind, keep):
    monkeypatch.setattr(origins, "COMFYUI", COMFYUI)
    net, compiled = Net(kind), cached(tmp_path / "cache") if keep else in_process()
    for tokens in (9, 8, 14, 9, 15):
        x, results = torch.randn(2, tokens, 32), []
        for call in (net, lambda *given: run(compiled, net, *given)):
            STATE["kind"] = "none"
            results.append(call(x, {"sigmas": 1, "info": {"kind": "none"}, KEY: HasGain()}))
        assert torch.allclose(*results, rtol=1e-4, atol=1e-5), tokens


class Leaves(Pack):
    """Takes itself away at its first call of each block."""

    def __call__(self, function, q, k, v, *args, transformer_options, **kwargs):
        if self.next is None:
            del transformer_options[KEY]
        else:
            transformer_options[KEY] = self.next
        return function(q, k, v, *args, **kwargs) * 3


class Twice(Block):
    def attend(self, q, k, v, options):
        return plain(q, k, v, 4, transformer_options=options) + 2 * plain(q, k, v, 4, transformer_options=options)


@pytest.mark.rotating
@pytest.mark.parametrize("successor", [None, lambda function, q, *args, **kwargs: q * 7])
@pytest.mark.parametrize("keep", [True, False])
def test_an_override_that_goes_is_gone(tmp_path, successor, keep):
    net, compiled = Net(Twice), cached(tmp_path / "cache") if keep else in_process()
    for _ in range(4):
        x, results, left = torch.randn(2, 9, 32), [], []
        for call in (net, lambda *given: run(compiled, net, *given)):
            override = Leaves()
            override.next = successor
            options = {"sigmas": 1, KEY: override}
            results.append(call(x, options))
            left.append(options.get(KEY))
        assert torch.allclose(*results, rtol=1e-4, atol=1e-5) and left[0] is left[1]


def test_an_override_with_two_ways_to_be_called_is_called_as_comfyui_does():
    net, compiled = Net(), in_process()

    class Two(Pack):
        def container_function(self, *args, **kwargs):
            raise AssertionError
    for _ in range(3):
        x = torch.randn(2, 9, 32)
        assert torch.allclose(run(compiled, net, x, {"sigmas": 1, KEY: Two()}), net(x, {"sigmas": 1, KEY: Two()}), atol=1e-6)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_no_operation_of_another_pack_is_recorded_into_a_cuda_graph(cuda_graphs):
    """It would be done again, not called again."""
    from int8_compile.compile.artifacts.runtime import BlockInfo
    from int8_compile.compile.step import Block as Called
    from int8_compile.compile.step import RegionState, Step
    from int8_compile.compile.torch_compiler import RegionCode

    block = Block()
    options = CompileOptions(mode="reduce-overhead" if cuda_graphs else "default")
    assert options.cuda_graphs == cuda_graphs
    called = Called(RegionState("Block", RegionCode("Block", options)), BlockInfo(block), True, True)
    step = Step(0, True, False, None)
    for given, stands in (({KEY: Pack()}, not cuda_graphs), ({"patches": {"double_block": [Pack()]}}, True), ({}, False)):
        before = dict(given)
        standing = step.stand_ins(called, block, given)
        assert (standing is not None) == stands
        if standing is not None:
            assert given != before
            with standing:
                pass
        assert given == before


class Long(Block):
    def forward(self, x, transformer_options=None):
        q, k, v = (part.sin() for part in self.qkv(x).chunk(3, dim=-1))
        for _ in range(3):
            q = self.out(self.attend(q, k, v, transformer_options).cos() * 2).sin()
        return x + q


def test_what_an_override_keeps_is_not_written_over():
    """Inductor uses the memory of its inputs, and of its result, for what it computes after it."""
    net, compiled = Net(Long), CompiledModule(CompileOptions(mark_sizes=True))

    def keeps():
        kept = []

        def override(function, q, k, v, *args, **kwargs):
            result = function(q, k, v, *args, **kwargs)
            kept.extend([q, k, v, result])
            return result if len(kept) < 80 else kept[len(kept) % 36 + 3]
        return override, kept
    (ours, mine), (theirs, eagers) = keeps(), keeps()
    for step in range(6):
        x = torch.randn(2, 6, 32)
        want, got = net(x, {"sigmas": step, KEY: theirs}), run(compiled, net, x, {"sigmas": step, KEY: ours})
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        for one, other in zip(mine, eagers):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert compiled.report.last_calls["graph"] == 3
