"""The compile engine on plain torch modules."""
from __future__ import annotations

import gc
import logging
import sys
import threading
import time
import types
import weakref

import pytest
import torch
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.events import Events
from int8_compile.compile.options import CompileOptions
from int8_compile.compile.regions import find_regions
from int8_compile.compile.report import CompileReport
from int8_compile.compile.torch_internals.interrupt import Interrupted
from torch._dynamo.utils import counters
from toys import Mlp


class Block(Mlp):
    def __init__(self, width=64):
        super().__init__(width, 128)


class OtherBlock(Block):
    pass


class Net(torch.nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block() for _ in range(depth)])
        self.others = torch.nn.ModuleList([OtherBlock() for _ in range(3)])
        self.error = None

    def forward(self, x, transformer_options=None):
        for block in (*self.blocks, *self.others):
            x = block(x, transformer_options=transformer_options)
        if self.error:
            raise self.error
        return x


@pytest.fixture
def graphs():
    start = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - start


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def run(compiled, net, *args, passthrough=lambda error: False, filter_guards=True, on_progress=None, **kwargs):
    return compiled.run(net, lambda: net(*args, **kwargs), filter_guards=filter_guards, passthrough=passthrough, on_progress=on_progress)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_each_block_class_is_compiled_once_and_shared_by_its_instances(graphs, fullgraph):
    net, x = Net(depth=7), torch.randn(3, 64)
    compiled = CompiledModule(CompileOptions(backend="aot_eager", dynamic=True, fullgraph=fullgraph))
    assert graphs() == 0
    torch.testing.assert_close(run(compiled, net, x), net(x))
    assert graphs() == 2
    assert compiled.report.regions == [("Block", 7), ("OtherBlock", 3)]
    assert compiled.report.graphs == 2 and compiled.report.seconds > 0 and compiled.report.status().startswith("ready: ")


@pytest.mark.parametrize("first", [3, 64], ids=["odd", "as long as the hidden size"])
def test_new_sizes_compile_nothing_new(graphs, first):
    net = Net()
    compiled = CompiledModule(CompileOptions(backend="aot_eager", dynamic=True))
    for rows in (first, 5, 128, 1000):
        run(compiled, net, torch.randn(rows, 64))
    assert graphs() == 2


class Asks(Block):
    def forward(self, x):
        return super().forward(x) if hasattr(self, "taken") else -super().forward(x)


def test_a_block_that_asks_for_an_attribute_that_it_lacks_is_compiled_and_follows_when_it_gets_one(graphs):
    net, x = torch.nn.Sequential(Asks(), Asks()), torch.randn(3, 64)
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    for has in (False, True):
        for block in net if has else ():
            block.taken = True
        torch.testing.assert_close(run(compiled, net, x), net(x))
        assert graphs() == 1 + has and not compiled.report.failure


def test_two_models_of_one_class_keep_their_own_weights():
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    a, b, x = Net(), Net(), torch.randn(3, 64)
    for net in (a, b, a):
        torch.testing.assert_close(run(compiled, net, x), net(x))


def test_a_block_of_another_shape_is_a_region_of_its_own():
    net = torch.nn.ModuleList([Block(), Block(), Block(32)])
    assert [(r.name, len(r.modules)) for r in find_regions(net)] == [("Block", 2), ("Block", 1)]


def test_without_repeats_the_whole_module_is_the_region(graphs):
    net, x = Block(), torch.randn(2, 64)
    assert [r.modules for r in find_regions(net)] == [[net]]
    assert type(find_regions(Net(), blocks_only=False)[0].modules[0]) is Net
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    torch.testing.assert_close(run(compiled, net, x), net(x))
    assert graphs() == 1


def test_the_modules_are_as_before_after_every_call():
    net = Net()
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    before = {name: dict(m.__dict__) for name, m in net.named_modules()}
    run(compiled, net, torch.randn(3, 64))
    net.error = KeyError("x")
    with pytest.raises(KeyError):
        run(compiled, net, torch.randn(3, 64))
    net.error = None
    assert {name: dict(m.__dict__) for name, m in net.named_modules()} == before
    assert all(m._compiled_call_impl is None for m in net.modules())


def test_a_replaced_block_is_found():
    net, x = Net(), torch.randn(3, 64)
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    run(compiled, net, x)
    net.blocks[1] = Block()
    torch.testing.assert_close(run(compiled, net, x), net(x))
    assert net.blocks[1] in compiled._regions[0].modules


def test_a_replaced_root_is_found(graphs):
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    first, second, x = Net(), Net(), torch.randn(3, 64)
    run(compiled, first, x)
    second.up = torch.nn.Linear(64, 64)
    second.forward = lambda x: second.up(Net.forward(second, x))
    torch.testing.assert_close(run(compiled, second, x), second(x))
    assert all(region.modules[0] in list(second.modules()) for region in compiled._regions)


def test_past_the_recompile_limit_it_goes_on_uncompiled(graphs):
    net = Net()
    compiled = CompiledModule(CompileOptions(backend="aot_eager", dynamic=False, cache_size_limit=2))
    for rows in (3, 4, 5, 6):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(run(compiled, net, x), net(x))
    assert graphs() == 2 * 2 and not compiled.report.failure
    assert any("Block was compiled 2 times, which is the limit" in message for message in compiled.report.fallbacks)


def _broken_backend(gm, inputs):
    raise RuntimeError("this backend cannot compile")


@pytest.mark.parametrize("suppress", [False, True], ids=["as torch is", "a pack has told torch to swallow errors"])
def test_a_failed_compile_goes_on_eager_and_warns_once(caplog, suppress):
    import torch._dynamo

    net, x = Net(), torch.randn(3, 64)
    compiled = CompiledModule(CompileOptions(backend=_broken_backend, title="INT8 Lazy Torch Compile"))
    with caplog.at_level(logging.WARNING), torch._dynamo.config.patch(suppress_errors=suppress):
        for _ in range(3):
            assert torch.equal(run(compiled, net, x), net(x))
        assert torch._dynamo.config.suppress_errors is suppress
    warnings = [r.message for r in caplog.records if "compile failed" in r.message]
    assert len(warnings) == 1
    assert warnings[0].startswith("INT8 Lazy Torch Compile: compile failed; running uncompiled.")
    assert "this backend cannot compile" in warnings[0]
    assert "this backend cannot compile" in compiled.report.failure


def _cannot_cosine(gm, inputs):
    if any("cos" in str(node.target) for node in gm.graph.nodes):
        raise RuntimeError("no cosine here")
    return gm


def test_a_kind_of_call_that_cannot_be_compiled_runs_eager_and_all_others_compiled_as_before(caplog):
    class Cosine(Block):
        def forward(self, x, cosine=False, transformer_options=None):
            return super().forward(x.cos() if cosine else x)

    class OfCosine(Net):
        def __init__(self):
            super().__init__()
            self.blocks, self.others = torch.nn.ModuleList([Cosine() for _ in range(4)]), torch.nn.ModuleList()

        def forward(self, x, cosine=False):
            for block in self.blocks:
                x = block(x, cosine=cosine)
            return x
    net, x = OfCosine(), torch.randn(3, 5, 64)
    compiled = CompiledModule(CompileOptions(backend=_cannot_cosine))
    with caplog.at_level(logging.WARNING):
        for cosine in (False, True, True, False, True, False):
            assert torch.equal(run(compiled, net, x, cosine=cosine), net(x, cosine=cosine))
            assert compiled.report.last_calls == {"artifact": 0, "graph": 0 if cosine else 4, "eager": 4 if cosine else 0}
    assert not compiled.report.failure and len([r for r in caplog.records if "cannot be compiled" in r.message]) == 1
    assert "Cosine cannot be compiled as it is called now: it runs uncompiled where it is called so. B" in compiled.report.fallbacks[0]
    assert "no cosine here" in compiled.report.fallbacks[0]
    for width in range(6, 20):  # kinds that cannot be compiled, each once
        run(compiled, net, torch.randn(3, width, 64), cosine=True)
    assert "no cosine here" in compiled.report.failure  # and then no more


def test_what_a_block_has_written_before_it_could_not_be_finished_is_not_written_twice():
    class Writes(Block):
        def forward(self, x, transformer_options=None):
            x += 1
            torch._dynamo.graph_break()
            return super().forward(x.cos())

    class OfWrites(Net):
        def __init__(self):
            super().__init__()
            self.blocks, self.others = torch.nn.ModuleList([Writes() for _ in range(4)]), torch.nn.ModuleList()

        def forward(self, x):
            x = x.clone()
            for block in self.blocks:
                x = block(x)
            return x
    net, x = OfWrites(), torch.randn(3, 5, 64)
    compiled = CompiledModule(CompileOptions(backend=_cannot_cosine))
    for _ in range(3):
        assert torch.equal(run(compiled, net, x), net(x))
    assert "no cosine here" in compiled.report.failure


def test_code_that_cannot_be_compiled_is_not_taken_for_the_code_that_was_before(monkeypatch):
    net, x = Net(), torch.randn(3, 5, 64)
    compiled = CompiledModule(CompileOptions(backend=_cannot_cosine))
    plain = Block.forward

    def cosine(self, x, transformer_options=None):
        return plain(self, x.cos())
    for patched in (False, True, False, True, False):
        monkeypatch.setattr(Block, "forward", cosine if patched else plain)
        assert torch.equal(run(compiled, net, x), net(x))
        assert compiled.report.last_calls == {"artifact": 0, "graph": 0 if patched else 7, "eager": 7 if patched else 0}


@pytest.mark.parametrize("failing", [0, 1], ids=["first class", "second class"])
def test_what_a_model_did_before_a_block_that_cannot_be_compiled_is_not_done_twice(failing):
    compiles = []

    def backend(gm, inputs):
        compiles.append(1)
        return _broken_backend(gm, inputs) if len(compiles) == failing + 1 else gm

    class Counting(Net):
        def forward(self, x, transformer_options=None):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x.mul_(2), transformer_options) * self.calls
    net, x = Counting(), torch.randn(3, 64)
    compiled = CompiledModule(CompileOptions(backend=backend))
    want = x * 2
    got = run(compiled, net, x)
    assert torch.equal(x, want) and net.calls == 1 and "this backend cannot compile" in compiled.report.failure
    net.calls = 0
    torch.testing.assert_close(got, net(want / 2))


def test_a_copy_of_a_block_by_its_dict_runs_its_own_weights():
    class Replicating(Net):
        def forward(self, x, transformer_options=None):
            block = self.blocks[0]
            replica = object.__new__(type(block))
            replica.__dict__ = {**block.__dict__, "_modules": dict(block._modules)}
            replica.up = torch.nn.Linear(64, 128)
            torch.nn.init.constant_(replica.up.weight, 0.01)
            torch.nn.init.zeros_(replica.up.bias)
            return super().forward(replica(x), transformer_options)
    net, x = Replicating(), torch.randn(3, 64)
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    for _ in range(2):
        torch.testing.assert_close(run(compiled, net, x), net(x))
    assert compiled.report.graphs == 2


def test_an_error_of_the_model_itself_is_not_blamed_on_compile(caplog):
    net = Net()
    net.error = ValueError("wrong latent")
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    with pytest.raises(ValueError, match="wrong latent"):
        run(compiled, net, torch.randn(3, 64))
    assert not compiled.report.failure and "compile failed" not in caplog.text


def test_out_of_memory_and_interrupts_pass_through_without_a_second_try():
    class Interrupt(BaseException):
        pass

    net = Net()
    calls = []

    def call():
        calls.append(1)
        raise net.error

    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    for error in (MemoryError("vram"), Interrupt()):
        net.error = error
        calls.clear()
        with pytest.raises(type(error)):
            compiled.run(net, call, filter_guards=True, passthrough=lambda e: isinstance(e, MemoryError))
        assert len(calls) == 1 and not compiled.report.failure


def test_process_wide_settings_are_as_before():
    import torch.fx.experimental._config as shape_config

    config = torch._dynamo.config

    def settings():
        return config.recompile_limit, config.accumulated_recompile_limit, shape_config.use_duck_shape

    before, seen = settings(), []
    compiled = CompiledModule(CompileOptions(backend="aot_eager", cache_size_limit=640))
    net = Net()
    compiled.run(net, lambda: (net(torch.randn(3, 64)), seen.append(settings())), filter_guards=True, passthrough=lambda e: False)
    assert seen[0][0] == 640 and seen[0][1] >= 640 and not seen[0][2]
    assert settings() == before


def test_compiled_code_does_not_keep_a_model_alive():
    net = Net()
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    run(compiled, net, torch.randn(3, 64))
    alive = weakref.ref(net)
    del net, compiled
    gc.collect()
    assert alive() is None


class AsksInVain(Block):
    """As ComfyUI's layers ask themselves for a bias or for factors that they lack."""

    def forward(self, x, transformer_options=None):
        return super().forward(x) * (2 if hasattr(self.up, "factors") else 1)


def test_what_a_guard_asked_in_vain_is_not_kept_alive():
    """Torch keeps such a layer for good, for a guard_filter_fn; one of each model that was ever compiled."""
    net = torch.nn.Sequential(*(AsksInVain() for _ in range(3)))
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    run(compiled, net, torch.randn(3, 64))
    assert compiled.report.graphs == 1
    alive = [weakref.ref(part) for part in net.modules()]
    del net, compiled
    gc.collect()
    assert [part() for part in alive] == [None] * len(alive)


class OptionsReader(torch.nn.Module):
    """A block that reads a number from transformer_options, as a patch may."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x, transformer_options):
        return self.b(self.a(x)) * transformer_options["block_index"]


def test_without_the_guard_filter_values_in_transformer_options_are_respected():
    blocks = torch.nn.ModuleList([OptionsReader() for _ in range(3)])
    x = torch.randn(2, 64)

    def call():
        return [block(x, transformer_options={"block_index": i + 1.5}) for i, block in enumerate(blocks)]

    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    got = compiled.run(blocks, call, filter_guards=False, passthrough=lambda e: False)
    torch.testing.assert_close(got, call())


def test_a_block_that_reads_bookkeeping_itself_gets_the_value_of_each_call():
    """ComfyUI's own blocks read it for patches only; this one is not ComfyUI's."""
    blocks = torch.nn.ModuleList([OptionsReader() for _ in range(3)])
    x = torch.randn(2, 64)

    def call():
        return [block(x, transformer_options={"block_index": i + 1, f"other_{i}": i}) for i, block in enumerate(blocks)]

    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    torch.testing.assert_close(compiled.run(blocks, call, filter_guards=True, passthrough=lambda e: False), call())
    assert compiled.report.calls["graph"] == 3


class FlagReader(torch.nn.Module):
    """A block with a switch in transformer_options, as LTXV's have."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x, transformer_options):
        x = self.a(x)
        return self.b(x) if transformer_options.get("run_vx", True) else x


def test_the_guard_filter_keeps_what_a_block_reads_for_itself():
    blocks = torch.nn.ModuleList([FlagReader() for _ in range(3)])
    x = torch.randn(2, 64)
    compiled = CompiledModule(CompileOptions(backend="aot_eager"))
    for options in ({}, {"run_vx": False}, {"run_vx": True}, {}):
        def call(options=options):
            return [block(x, transformer_options=options) for block in blocks]
        got = compiled.run(blocks, call, filter_guards=True, passthrough=lambda e: False)
        torch.testing.assert_close(got, call())


@pytest.mark.parametrize("name, guard_type, value, stays", [
    ("kwargs['transformer_options']['block_index']", "EQUALS_MATCH", 3, False),
    ("kwargs['transformer_options']['run_vx']", "CONSTANT_MATCH", True, True),
    ("kwargs['transformer_options']", "DICT_CONTAINS", {}, True),
    ("kwargs['transformer_options']", "DICT_NOT_CONTAINS", {}, True),  # torch 2.14
    ("kwargs['transformer_options']", "A_KIND_TO_COME", {}, True),
    ("kwargs['transformer_options']", "DICT_LENGTH", {}, False),
    ("args[2]['block'][1]", "EQUALS_MATCH", 4, False),
    ("args[2]['run_vx']", "CONSTANT_MATCH", True, True),
    ("args[2]", "DICT_LENGTH", {}, False),
    ("args[2]", "SEQUENCE_LENGTH", (1, 2), True),
    ("args[3].__closure__[1].cell_contents['block_index']", "EQUALS_MATCH", 3, False),
    ("args[3].__closure__[1].cell_contents['run_vx']", "CONSTANT_MATCH", True, True),
    ("args[3].__closure__[1].cell_contents", "DICT_LENGTH", {"block_index": 3}, False),
    ("args[3].__closure__[1].cell_contents", "DICT_LENGTH", {"keys": 3}, True),
    ("args[3].__closure__[0].cell_contents", "EQUALS_MATCH", 3, True),
    ("args[0]", "TENSOR_MATCH", None, True),
    ("module._modules['up'].weight", "TENSOR_MATCH", None, True),
])
def test_guards_are_dropped_on_bookkeeping_only_wherever_the_options_stand(name, guard_type, value, stays):
    from int8_compile.compile.torch_internals.guard_filter import keep_guard

    assert keep_guard(name, guard_type, value) is stays


def test_a_block_that_gets_its_options_by_position_is_one_graph(graphs):
    class Positional(Net):
        def forward(self, x, transformer_options):
            for index, block in enumerate(self.blocks):
                transformer_options["block_index"] = index
                x = block(x, transformer_options)
            return x

    class Reader(Block):
        def forward(self, x, transformer_options):
            if "patches_replace" in transformer_options:
                return x
            return super().forward(x)

    net = Positional()
    net.blocks = torch.nn.ModuleList([Reader() for _ in range(4)])
    net.others = torch.nn.ModuleList()
    run(CompiledModule(CompileOptions(backend="aot_eager", mark_sizes=True)), net, torch.randn(2, 8, 64), transformer_options={})
    assert graphs() == 1


def test_a_transposed_input_costs_no_graph_and_is_written_back(graphs):
    class InPlace(Block):
        def forward(self, x, transformer_options=None):
            transformer_options["block"] = "seen"
            x += self.down(torch.nn.functional.gelu(self.up(x)))
            return x

    net = Net()
    net.blocks = torch.nn.ModuleList([InPlace() for _ in range(4)])
    compiled = CompiledModule(CompileOptions(backend="aot_eager", mark_sizes=True))
    for tokens in (8, 12, 20):
        loose = torch.randn(2, 64, tokens).transpose(1, 2)
        changed = loose.clone()
        want = net(changed, transformer_options={})
        options = {"block": "before"}
        assert torch.allclose(run(compiled, net, loose, transformer_options=options), want, atol=1e-5)
        assert torch.allclose(loose, changed, atol=1e-5) and options == {"block": "seen"}
    assert graphs() == 2


def test_a_layout_that_only_the_first_block_gets_costs_no_graph(graphs):
    class Dense(Block):
        def forward(self, x, transformer_options=None):
            return self.down(torch.nn.functional.gelu(self.up(x)))  # dense, whatever the layout of x

    net = Net()
    net.blocks = torch.nn.ModuleList([Dense() for _ in range(4)])
    net.others = torch.nn.ModuleList()
    loose = torch.randn(2, 64, 8).transpose(1, 2)
    compiled = CompiledModule(CompileOptions(backend="aot_eager", mark_sizes=True))
    torch.testing.assert_close(run(compiled, net, loose), net(loose))
    assert graphs() == 1


def test_sizes_inside_tuples_are_marked_too(graphs):
    class Pair(Block):
        def forward(self, x, pe):
            return super().forward(x * pe[0] + pe[1])

    class PairNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Pair() for _ in range(3)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x, (torch.ones(x.shape[1], 64), torch.zeros(x.shape[1], 64)))
            return x

    compiled, net = CompiledModule(CompileOptions(backend="aot_eager", mark_sizes=True)), PairNet()
    for tokens in (8, 12, 64):
        run(compiled, net, torch.randn(2, tokens, 64))
    assert graphs() == 1


def test_a_module_that_is_imported_while_the_garbage_collector_runs_hurts_no_compile(graphs, request):
    """As by another thread, which a finalizer lets run: any list of pairs may start a collection."""
    before, known = gc.get_threshold(), set(sys.modules)

    def imports(phase, _):
        if phase == "start":
            sys.modules[f"imported_{len(sys.modules)}"] = types.ModuleType("imported")

    def put_back():
        gc.set_threshold(*before)
        gc.callbacks.remove(imports)
        for name in sys.modules.keys() - known:
            if name.startswith("imported_"):
                del sys.modules[name]
    request.addfinalizer(put_back)
    net, x, engine = Net(), torch.randn(2, 4, 64), CompiledModule(CompileOptions(backend="eager"), torch.device("cpu"))
    gc.callbacks.append(imports)
    gc.set_threshold(100, 1000, 1000)
    got = engine.run(net, lambda: net(x), filter_guards=True, passthrough=lambda error: False)
    assert not engine.report.failure and graphs() == 2
    assert torch.equal(got, net(x))


def test_settings_of_two_threads_that_leave_out_of_order_are_put_back():
    import torch.fx.experimental._config as shape_config
    from int8_compile.compile.torch_internals.settings import compile_settings

    config = torch._dynamo.config
    before = config.recompile_limit, config.accumulated_recompile_limit, shape_config.use_duck_shape
    first, second = compile_settings(640), compile_settings(900)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert config.recompile_limit == 900 and not shape_config.use_duck_shape
    second.__exit__(None, None, None)
    assert (config.recompile_limit, config.accumulated_recompile_limit, shape_config.use_duck_shape) == before


def test_the_report_names_recompiles_and_breaks_with_their_cause():
    class Breaks(Block):
        def forward(self, x, transformer_options=None):
            torch._dynamo.graph_break()
            return super().forward(x)

    net = Net()
    net.others = torch.nn.ModuleList([Breaks(), Breaks()])
    compiled = CompiledModule(CompileOptions(backend="aot_eager", dynamic=False))
    run(compiled, net, torch.randn(2, 8, 64))
    run(compiled, net, torch.randn(2, 9, 64))
    assert any(cause.startswith("Block: tensor") and "expected 8, actual 9" in cause for cause in compiled.report.recompiles)
    assert any("graph_break" in reason for reason in compiled.report.breaks)
    assert "graph breaks" in compiled.report.summary() and compiled.report.to_dict()["recompiles"]


def test_cuda_graphs_are_left_out_with_the_reason_where_they_cannot_be(caplog):
    compiled = CompiledModule(CompileOptions(mode="reduce-overhead"))
    assert compiled.report.fallbacks == ["CUDA graphs do not exist on cpu: compiling without them."]
    assert not compiled.options.cuda_graphs and caplog.text.count("CUDA graphs") == 1
    net = Net()
    x = torch.randn(2, 8, 64)
    compiled = CompiledModule(CompileOptions(backend="cudagraphs"))
    assert torch.allclose(run(compiled, net, x), net(x)) and not compiled.report.failure


class Told(list):
    def __call__(self, report, doing="", progress=None):
        self.append(doing or report.status())
        self.progress = progress
        self.text = report.text()


def test_it_tells_what_it_compiles_and_when_it_is_ready_and_nothing_more():
    compiled, net, told = CompiledModule(CompileOptions(backend="aot_eager", mark_sizes=True)), Net(), Told()
    for _ in range(3):
        run(compiled, net, torch.randn(3, 64), on_progress=told)
    assert told[0] == "loading the compiler"
    assert [text for text in dict.fromkeys(told[1:]) if text.startswith("compiling")] == [
        f"compiling {name} {number}/{len(compiled.report.regions)}" for number, (name, _) in enumerate(compiled.report.regions, 1)]
    assert told[-1] == compiled.report.status() and told[-1].startswith("ready: ")
    before = len(told)
    run(compiled, net, torch.randn(3, 64), on_progress=told)
    assert len(told) == before
    other = Told()  # a node that came later hears what there is
    run(compiled, net, torch.randn(3, 64), on_progress=other)
    assert other == [compiled.report.status()]


def test_a_failure_is_told_with_its_remedy():
    compiled, net, told = CompiledModule(CompileOptions(backend=_broken_backend)), Net(), Told()
    run(compiled, net, torch.randn(3, 64), on_progress=told)
    assert told[-1] == "running uncompiled: the compile failed" and not [text for text in told if text.startswith("ready")]
    assert "Compile failed; running uncompiled. " in told.text and "this backend cannot compile" in told.text


@pytest.mark.parametrize("cause, sentence", [
    ("Block: tensor 'args[0]' size mismatch at index 0. expected 1, actual 2",
     "Block, since args[0] has the size 2 in dimension 0, not 1 as before"),
    ("Block: tensor 'vec' dtype mismatch. expected BFloat16, actual Float", "Block, since vec is Float, not BFloat16 as before"),
    ("Block: kwargs['flag'] == 3", "Block, since this no longer held: kwargs['flag'] == 3"),
])
def test_a_recompile_is_explained_in_a_sentence(cause, sentence):
    assert f"compiled again: {sentence}" in CompileReport("t", recompiles=[cause]).text()


def test_an_interrupt_ends_a_compile_at_once_and_the_next_call_compiles():
    asked, slow = threading.Event(), True

    def backend(graph, inputs):
        threading.Timer(0.3, asked.set).start()
        end = time.monotonic() + 30
        while slow and time.monotonic() < end:
            time.sleep(0.01)
        return graph.forward

    compiled, net, x, told = CompiledModule(CompileOptions(backend=backend)), Net(), torch.randn(3, 64), Told()
    start = time.monotonic()
    with pytest.raises(Interrupted):
        compiled.run(net, lambda: net(x), filter_guards=True, passthrough=lambda error: False, on_progress=told, interrupted=asked.is_set)
    assert time.monotonic() - start < 5
    assert told[-1].startswith("compiling") and told.progress == (0, 2)
    assert not compiled.report.failure and not compiled.report.graphs and not compiled.report.compiled_from_step
    slow = False
    torch.testing.assert_close(run(compiled, net, x), net(x))
    assert compiled.report.graphs == 2 and not compiled.report.failure


def test_of_what_the_builders_compiler_wrote_a_report_has_the_remedy_and_one_line():
    events = Events("Compile Model", background=True)
    events.in_step = True
    written = "CppCompileError: C++ compile error\n\nCommand:\ng++ -I/srv/include x.cpp\nOutput:\nNo space left on device\n" + "x\n" * 500
    events.on_artifact("refused", "Block", written)
    (message,) = events.report.fallbacks
    assert "-I" not in message and message.startswith("Block: The disk is full: free it") and "\n" not in message and len(message) < 600
    events.on_artifact("refused", "Other", "its attributes change")
    assert events.report.fallbacks[1].startswith("Other: its attributes change: running uncompiled.")


def test_between_the_end_of_a_build_and_the_next_step_nothing_is_called_uncompiled():
    events = Events("Compile Model", background=True)
    report = events.report
    report.steps = 4
    events.on_artifact("building", "Block", "a")
    events.on_artifact("building", "Other", "b")
    events.on_artifact("ended", "Block", "a")
    events.on_artifact("built", "Block", "a")
    assert report.status() == "building in the background: Other"
    events.on_artifact("ended", "Other", "b")
    events.on_artifact("built", "Other", "b")
    assert report.status() == "compiled, from the next step on" == report.short()[0]
    report.steps += 1  # and it did not serve
    assert report.status() == "running uncompiled"
    report.compiled_from_step, report.last_calls = 5, {"artifact": 0, "graph": 0, "eager": 3}  # another size, say
    events.on_artifact("built", "Block", "c")
    assert report.status() == "compiled, from the next step on"


@pytest.mark.parametrize("cause, kept", [
    ("InductorError: CppCompileError: C++ compile error\n\nCommand:\nmycxx x.cpp -O3 -o /srv/x\n\nOutput:\nno room", "Output: | no room"),
    ("InductorError: CppCompileError: C++ compile error\n\nCommand:\nmycxx x.cpp -O3 -o /srv/x", "C++ compile error"),
    ("CalledProcessError: Command '['gcc', 'a b/[1].c', '-O3']' returned non-zero exit status 1.", "returned non-zero exit status 1."),
    ("CalledProcessError: Command '['g++', 'a]', '-O3']' died with <Signals.SIGSEGV: 11>.", "died with <Signals.SIGSEGV: 11>."),
    ("TimeoutExpired: Command 'g++ -O3 x.cpp' timed out after 3 seconds", "timed out after 3 seconds"),
    ("PTXASError: PTXAS error: no room\nRepro command: ptxas -O3 x.ptx -o x.o\nmore", "PTXASError: PTXAS error: no room | more"),
    ("RuntimeError: \x1b[2J\u202eno room. Command: x is not known -O2", "\\x1b[2J\\u202eno room. Command: x is not known")])
def test_a_compilers_command_line_is_in_no_warning(cause, kept):
    (warning,) = CompileReport("Compile Model", failure=cause).warnings()
    assert kept in warning and "-O3" not in warning and "running uncompiled" in warning


def test_why_blocks_run_uncompiled_is_in_the_report_only_while_they_do(caplog):
    net, compiled, x = Net(), CompiledModule(CompileOptions(backend="aot_eager")), torch.randn(3, 64)
    run(compiled, net, x)
    for _ in range(2):
        hook = net.get_submodule(next(name for name, _ in net.named_modules() if name.count("."))).register_forward_hook(lambda *_: None)
        run(compiled, net, x)
        assert any("forward hooks" in text for text in compiled.report.fallbacks) and compiled.report.last_calls["eager"]
        hook.remove()
        run(compiled, net, x)
        assert not compiled.report.fallbacks and not compiled.report.last_calls["eager"]
    assert caplog.text.count("some blocks have forward hooks") == 1
