"""What was compiled for a batch of 2 serves a batch of 1, and is never wrong for it."""
from __future__ import annotations

import random

import einops
import pytest
import torch
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions
from int8_compile.compile.torch_internals.settings import varying

WIDTH = 16


def written(copy):
    def way(x, y, one):
        x = x * 2
        copy(x[:, :3]).mul_(2)  # a view for a batch of 1
        return x
    return way


def linear_of(part, weight=lambda x: x[0, :2], bias=None):
    return lambda x, y, one: x.mean((1, 2), keepdim=True) + torch.nn.functional.linear(part(x), weight(x), bias).sum((1, 2), keepdim=True)


# name: (of x [batch, tokens, width], y [batch, 1, width] and one [1, tokens, width], graphs for batches of 2, 1, 3, 1, 5)
WAYS = {
    "linear": (lambda x, y, one: x, 1),
    "linear of the whole": (linear_of(lambda x: x.mean(0, keepdim=True).expand(x.shape)), 2),
    "linear of one": (lambda x, y, one: x + torch.nn.functional.linear(x[:, 1:], x[0, 0])[:, :1, None], 2),
    "written to flat": (written(lambda part: part.flatten(0, 1)), 2),
    "written to reshaped": (written(lambda part: part.reshape(-1, WIDTH)), 2),
    "written to contiguous": (written(lambda part: part.contiguous()), 2),
    "written to einops'": (written(lambda part: einops.rearrange(part, "b n (h d) -> (b n) h d", h=2)), 2),
    "written to a cast": (written(lambda part: part.to(torch.float32).reshape(-1, WIDTH)), 2),
    "written to a dropped": (written(lambda part: torch.nn.functional.dropout(part.reshape(-1, WIDTH), 0.5, False)), 2),
    "written by a function": (written(lambda part: torch.nn.functional.silu(part.reshape(-1, WIDTH), inplace=True)), 2),
    "written to a product": (written(lambda part: torch.einsum("bnd->nbd", part).reshape(-1, WIDTH)), 2),
    "modulated": (lambda x, y, one: x * (1 + y) + one, 1),
    "normed": (lambda x, y, one: torch.nn.functional.layer_norm(x, (WIDTH,)) * y, 1),
    "heads": (lambda x, y, one: (x * y).view(x.shape[0], -1, 2, 8).transpose(1, 2).flatten(2), 1),
    "broadcast": (lambda x, y, one: torch.broadcast_to(one[:, :1], x.shape) + x, 1),
    "expanded": (lambda x, y, one: one.expand(x.shape[0], -1, -1) * x, 1),
    "of the whole": (lambda x, y, one: x - x.mean(0, keepdim=True), 1),
    "first": (lambda x, y, one: x[:1] + x[-1:] + one, 1),
    "concatenated": (lambda x, y, one: torch.cat([y, x], 1), 1),
    "taken apart": (lambda x, y, one: torch.cat([x, x * y], 1)[:, x.shape[1]:] + one, 1),  # as Flux does after its attention
    "halved": (lambda x, y, one: torch.cat([half * 2 for half in x.chunk(2)]), 2),
    "asked": (lambda x, y, one: x + 1 if x.shape[0] == 1 else x * 2, 2),
    "asked for more": (lambda x, y, one: x + 1 if len(x) > 1 else x * 2, 2),
    "squeezed": (lambda x, y, one: (x * y).squeeze() + 1, 2),
    "squeezed at 0": (lambda x, y, one: torch.squeeze(x * y, 0) + 1, 2),
    "squeezed at dim": (lambda x, y, one: (x * y).squeeze(dim=(0, 1)) + 1, 2),
    "squeezed as torch says": (lambda x, y, one: torch.squeeze(input=x * y, dim=0) + 1, 2),
    "squeezed in place": (lambda x, y, one: (x * y).squeeze_(0) + 1, 2),
    "squeezed copy": (lambda x, y, one: torch.squeeze_copy(x * y, 0) + 1, 2),
    "squeezed by ATen": (lambda x, y, one: torch.ops.aten.squeeze.dim(x * y, 0) + 1, 2),
    "squeezed number": (lambda x, y, one: x + y.sum().squeeze(0), 1),
    "squeezed at another": (lambda x, y, one: y.squeeze(1) + 1, 1),
    "squeezed in a sum": (lambda x, y, one: x.sum((1, 2), keepdim=True).squeeze() + 1, 2),
}


class Block(torch.nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def forward(self, x, y, one):
        return self.way(self.layers(x), y, one)


def sampling(way, backend):
    """A function of batch and tokens: (compiled result, eager result), and of how many graphs there are."""
    blocks = torch.nn.ModuleList([Block(way), Block(way)])
    root, compiled = torch.nn.ModuleList([blocks]), CompiledModule(CompileOptions(backend=backend, mark_sizes=True))

    def both(batch, tokens, batch_of_y=None):
        inputs = torch.randn(batch, tokens, WIDTH), torch.randn(batch_of_y or batch, 1, WIDTH), torch.randn(1, tokens, WIDTH)
        with torch.inference_mode():
            expected = [block(*inputs) for block in blocks]
            got = compiled.run(root, lambda: [block(*inputs) for block in blocks], filter_guards=True, passthrough=lambda error: False)
        assert compiled.report.failure == ""
        return got[-1], expected[-1]
    return both, lambda: compiled.report.graphs


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_1_is_served_by_the_graph_of_2_unless_it_is_computed_otherwise(way):
    """With inductor, which takes what it was told of sizes for true."""
    function, graphs = WAYS[way]
    both, compiled = sampling(function, "inductor")
    for batch, tokens in ((2, 6), (1, 6), (3, 7), (1, 9), (5, 6)):
        assert_same(*both(batch, tokens))
    assert compiled() == graphs


@pytest.mark.parametrize("way, counts", [("linear", (1, 1, 1, 1)), ("normed", (1, 1, 1, 1)), ("heads", (1, 1, 1, 1)),
                                         ("concatenated", (1, 1, 1, 1)), ("modulated", (1, 2, 2, 2)), ("halved", (1, 2, 2, 2)),
                                         ("asked", (1, 2, 2, 2)), ("squeezed", (1, 2, 2, 2))])
def test_a_batch_of_1_first_is_compiled_for_all(way, counts):
    """But where another is computed otherwise, or an input has a batch of 1 always."""
    both, compiled = sampling(WAYS[way][0], "inductor")
    for batch, graphs in zip((1, 2, 1, 4), counts, strict=True):
        assert_same(*both(batch, 6))
        assert compiled() == graphs


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_1_first_is_right_however_it_is_computed(way):
    both, compiled = sampling(WAYS[way][0], "inductor")
    for batch in (1, 2, 3, 1):
        assert_same(*both(batch, 6))
    assert compiled() <= 2


class Writing(Block):
    def forward(self, x, y):
        x.add_(1)
        return x + y * 2


@pytest.mark.parametrize("shares", [False, True])
def test_inputs_that_share_memory_stay_seen(shares):
    root, compiled = torch.nn.ModuleList([torch.nn.ModuleList([Writing(None), Writing(None)])]), CompiledModule(
        CompileOptions(backend="aot_eager", mark_sizes=True))
    for batch in (1, 2, 1):
        results = []
        for run in (lambda call: call(), lambda call: compiled.run(root, call, filter_guards=True, passthrough=lambda error: False)):
            x = torch.ones(batch, 6, WIDTH)
            y = x[:, :] if shares else torch.ones(batch, 6, WIDTH)
            with torch.inference_mode():
                results.append(run(lambda x=x, y=y: root[0][0](x, y)))
        assert_same(*results)
    assert compiled.report.graphs <= (2 if shares else 1)


class Drawing(Block):
    def forward(self, x):
        return x * random.randint(1, 1000)


def test_nothing_is_drawn_for_what_is_not_run():
    root, compiled = torch.nn.ModuleList([torch.nn.ModuleList([Drawing(None), Drawing(None)])]), CompiledModule(
        CompileOptions(backend="aot_eager", mark_sizes=True))
    x = torch.ones(1, 6, WIDTH)
    for _ in range(2):
        random.seed(3)
        expected, after = root[0][0](x), random.random()
        random.seed(3)
        with torch.inference_mode():
            got = compiled.run(root, lambda: root[0][0](x), filter_guards=True, passthrough=lambda error: False)
        assert torch.equal(got, expected) and random.random() == after


class Asking(Block):
    """A block in whose model another pack compiles a function of its own."""

    def forward(self, x):
        return self.layers[0](x[:, 1:])


def test_what_others_compile_meanwhile_has_torchs_own_linear():
    graphs, blocks = [], torch.nn.ModuleList([Asking(None), Asking(None)])

    def keep(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd
        return aot_autograd(fw_compiler=lambda graph, inputs: graphs.append(str(graph.code)) or graph.forward)(graph, inputs)
    theirs = torch.compile(lambda x: blocks[1].layers[0](x[:, 1:]), backend=keep, dynamic=True)
    root, compiled = torch.nn.ModuleList([blocks]), CompiledModule(CompileOptions(backend="aot_eager", mark_sizes=True))
    x = torch.randn(2, 6, WIDTH)
    with torch.inference_mode():
        for batch in (1, 2):
            part = x[:batch]
            got = compiled.run(root, lambda part=part: (blocks[0](part), theirs(part)), filter_guards=True, passthrough=lambda error: False)
            assert_same(got[1], blocks[1](part))
            assert_same(got[0], blocks[0](part))
    assert graphs and not any("float_linear" in graph for graph in graphs)
    assert compiled.report.graphs == 1 + len(graphs)  # torch's counter is the process's


def test_an_input_that_is_broadcast_in_one_call_and_not_in_the_next_is_right():
    both, compiled = sampling(WAYS["modulated"][0], "inductor")
    for batch, of_y in ((2, 2), (2, 1), (1, 1), (3, 1), (3, 3), (1, 3), (2, 2)):
        assert_same(*both(batch, 6, of_y))
    assert compiled() <= 4


def test_tokens_may_be_one_too():
    both, compiled = sampling(WAYS["concatenated"][0], "aot_eager")
    for batch, tokens in ((2, 6), (2, 1), (1, 1), (1, 7)):
        assert_same(*both(batch, tokens))
    assert compiled() <= 2


class Masked(Block):
    def forward(self, x, mask=None):
        x = self.layers(x)
        return x if mask is None else x * mask


def test_another_kind_of_call_that_comes_with_a_batch_of_1_is_compiled_for_all_batches_too():
    blocks = torch.nn.ModuleList([Masked(None), Masked(None)])
    root, compiled = torch.nn.ModuleList([blocks]), CompiledModule(CompileOptions(backend="inductor", mark_sizes=True))
    graphs = []
    for batch, masked in ((1, False), (1, True), (2, True), (1, True), (3, False), (1, False), (4, True)):
        x = torch.randn(batch, 6, WIDTH)
        given = (x, torch.rand(batch, 6, 1)) if masked else (x,)
        with torch.inference_mode():
            got = compiled.run(root, lambda given=given: [block(*given) for block in blocks], filter_guards=True,
                               passthrough=lambda error: False)
            for block, result in zip(blocks, got, strict=True):
                assert_same(result, block(*given))
        graphs.append(compiled.report.graphs)
    assert compiled.report.failure == "" and graphs == [1, 2, 2, 2, 2, 2, 2]


def test_a_call_that_wants_gradients_and_cannot_be_compiled_leaves_the_others_compiled():
    def no_gradients(graph, inputs):
        if torch.is_grad_enabled():
            raise NotImplementedError
        return graph
    blocks = torch.nn.ModuleList([Masked(None), Masked(None)])
    root, compiled = torch.nn.ModuleList([blocks]), CompiledModule(CompileOptions(backend=no_gradients, mark_sizes=True))
    x = torch.randn(2, 6, WIDTH)
    for gradients in (True, False, True, False):
        with torch.set_grad_enabled(gradients):
            got = compiled.run(root, lambda: [block(x) for block in blocks], filter_guards=True, passthrough=lambda error: False)
            assert_same(got[0], blocks[0](x))
        assert compiled.report.failure == "" and compiled.report.last_calls == {"artifact": 0, "graph": 0 if gradients else 2,
                                                                                "eager": 2 if gradients else 0}


def test_where_torch_cannot_a_batch_of_1_is_compiled_for_by_itself():
    """A backend that asks whether a size may be 1, as one that cannot have that would."""
    def picky(graph, inputs):
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        if any(isinstance(value, torch.SymInt) and value.node.shape_env.bound_sympy(value.node.expr).lower < 2 for value in values):
            raise NotImplementedError("a size may be 1")
        return graph
    both, compiled = sampling(WAYS["modulated"][0], picky)
    for batch in (2, 1, 3):
        assert_same(*both(batch, 6))
    assert compiled() == 2


RAN = []


def noted(x):
    RAN.append(None)
    torch._dynamo.graph_break()
    return x + 1


def twice_in_place(x, y, one):
    torch._dynamo.graph_break()  # before any graph: what comes now has run when the rest is compiled
    x.mul_(2)
    torch._dynamo.graph_break()
    return x + y


@pytest.mark.parametrize("way, graphs", [(lambda x, y, one: noted(x * 2) * y, [4, 8, 8]), (lambda x, y, one: noted(x) * y, None),
                                         (twice_in_place, None)], ids=["between", "first", "in place"])
def test_what_has_breaks_is_compiled_for_1_by_itself_and_runs_once(way, graphs):
    both, compiled = sampling(way, "aot_eager")
    counts = []
    for batch in (2, 1, 3):
        RAN.clear()
        assert_same(*both(batch, 6))
        assert len(RAN) == (0 if way is twice_in_place else 4)  # two blocks, eager and compiled
        counts.append(compiled())
    assert graphs in (None, counts)


def test_what_was_kept_for_sizes_from_2_on_is_not_taken_for_one_that_may_be_1():
    """Inductor's and AOTAutograd's caches on disk know a graph by its operators, not by the sizes that it was traced for."""
    from int8_compile.int8.graph_pass import Int8GraphPass  # imports inductor

    own = Int8GraphPass()
    apart = own.uuid()
    with varying((), True):
        assert own.uuid() != apart


def test_settings_of_two_threads_that_leave_out_of_order_are_put_back():
    import torch.fx.experimental._config as shape_config

    config = torch.compiler.config
    before = config.dynamic_sources, shape_config.backed_size_oblivious
    first, second = varying(["L['args'][1]"], True), varying(["L['args'][1]", "L['args'][2]"], False)
    first.__enter__()
    assert shape_config.backed_size_oblivious and config.dynamic_sources == "L['args'][1]"
    second.__enter__()
    assert config.dynamic_sources.split(",") == ["L['args'][1]", "L['args'][2]"]
    first.__exit__(None, None, None)
    assert not shape_config.backed_size_oblivious and config.dynamic_sources.split(",") == ["L['args'][1]", "L['args'][2]"]
    second.__exit__(None, None, None)
    assert (config.dynamic_sources, shape_config.backed_size_oblivious) == before
