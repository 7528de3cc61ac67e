"""The compile engine on plain torch modules."""
from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions
from int8_compile.compile.regions import find_regions
from torch._dynamo.utils import counters


class Block(torch.nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up = torch.nn.Linear(width, 128)
        self.down = torch.nn.Linear(128, width)

    def forward(self, x, transformer_options=None):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


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


def run(compiled, net, *args, passthrough=lambda error: False, filter_guards=True, **kwargs):
    return compiled.run(net, lambda: net(*args, **kwargs), filter_guards=filter_guards, passthrough=passthrough)


def test_each_block_class_is_compiled_once_and_shared_by_its_instances(graphs):
    net, x = Net(depth=7), torch.randn(3, 64)
    compiled = CompiledModule(CompileOptions(backend="aot_eager", dynamic=True))
    assert graphs() == 0
    torch.testing.assert_close(run(compiled, net, x), net(x))
    assert graphs() == 2
    assert compiled.report.regions == [("Block", 7), ("OtherBlock", 3)]
    assert compiled.report.graphs == 2 and compiled.report.seconds > 0


@pytest.mark.parametrize("first", [3, 64], ids=["odd", "as long as the hidden size"])
def test_new_sizes_compile_nothing_new(graphs, first):
    net = Net()
    compiled = CompiledModule(CompileOptions(backend="aot_eager", dynamic=True))
    for rows in (first, 5, 128, 1000):
        run(compiled, net, torch.randn(rows, 64))
    assert graphs() == 2


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


def _broken_backend(gm, inputs):
    raise RuntimeError("this backend cannot compile")


def test_a_failed_compile_goes_on_eager_and_warns_once(caplog):
    net, x = Net(), torch.randn(3, 64)
    compiled = CompiledModule(CompileOptions(backend=_broken_backend, title="INT8 Lazy Torch Compile"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(run(compiled, net, x), net(x))
    warnings = [r.message for r in caplog.records if "compile failed" in r.message]
    assert len(warnings) == 1
    assert warnings[0].startswith("INT8 Lazy Torch Compile: compile failed; running uncompiled.")
    assert "this backend cannot compile" in warnings[0]
    assert "this backend cannot compile" in compiled.report.failure


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
    compiled.run(Net(), lambda: seen.append(settings()), filter_guards=True, passthrough=lambda e: False)
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


def test_the_guard_filter_drops_guards_on_bookkeeping(graphs):
    blocks = torch.nn.ModuleList([OptionsReader() for _ in range(3)])
    x = torch.randn(2, 64)

    def call():
        return [block(x, transformer_options={"block_index": i + 1, f"other_{i}": i}) for i, block in enumerate(blocks)]

    CompiledModule(CompileOptions(backend="aot_eager")).run(blocks, call, filter_guards=True, passthrough=lambda e: False)
    assert graphs() == 1


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
