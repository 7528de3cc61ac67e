"""Dynamic VRAM and compiled blocks, with a stand-in for the memory that comfy_aimdo gives on a GPU: core's own code fetches the weights."""
from __future__ import annotations

import functools
import itertools

import pytest
import torch
from toys import Mlp, Stack

pytestmark = pytest.mark.comfy

WIDTH = 64


class Memory:
    """What comfy_aimdo.model_vbar gives: pages that are faulted in, pinned and taken away. is_full: no page is given."""

    def __init__(self):
        self.bytes = torch.zeros(1 << 20, dtype=torch.uint8)
        self.used, self.generation, self.is_full = 0, 1, False
        self.pins: dict[int, int] = {}
        self.faults = 0

    def alloc(self, size):
        offset, self.used = self.used, self.used + (size + 511) // 512 * 512
        return self, offset, size

    def vbar_fault(self, alloc):
        self.faults += 1
        if self.is_full:
            return None
        self.pins[alloc[1]] = self.pins.get(alloc[1], 0) + 1
        return bytes([self.generation])

    def vbar_unpin(self, alloc):
        self.pins[alloc[1]] -= 1

    def vbar_signature_compare(self, one, other):
        return one is not None and one == other

    def aimdo_to_tensor(self, alloc, device):
        return self.bytes[alloc[1]:alloc[1] + alloc[2]]

    def evict(self):
        assert not any(self.pins.values())
        self.bytes.fill_(0xFF)
        self.generation += 1


def copies_of_weights(call):
    """(call's result, how many weights were copied in it)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        result = call()
    shapes = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    return result, sum((len(shape) == 2 and min(shape) >= WIDTH) or (len(shape) == 1 and shape[0] >= WIDTH * WIDTH) for shape in shapes)


class Net(Stack):
    def __init__(self, ops):
        super().__init__(functools.partial(Mlp, WIDTH, 2 * WIDTH, ops, torch.nn.functional.silu, bias=False))
        self.before_block = lambda block: None

    def forward(self, x):
        for block in self.blocks:
            self.before_block(block)
            x = block(x)
        return x


@pytest.fixture(params=["disable_weight_init", "manual_cast"])
def dynamic(comfy, monkeypatch, request):
    """(net, memory, what it computes)."""
    import comfy.model_management
    import comfy.ops
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch

    torch.manual_seed(0)
    net, memory = Net(getattr(comfy.ops, request.param)).requires_grad_(False), Memory()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 5, WIDTH)
    want = net(x)
    for layer in (m for m in net.modules() if isinstance(m, comfy.ops.CastWeightBiasOp)):  # as ModelPatcherDynamic.load does
        layer.comfy_cast_weights, layer._v_signature, layer.seed_key, layer._pin_state = True, None, "", None
        layer.weight_function, layer.bias_function = [], []
        layer.weight_lowvram_function = layer.bias_lowvram_function = None
        layer._v = memory.alloc(4 * sum((p.numel() + 127) // 128 * 128 for p in layer.parameters()))
    for name in ("vbar_fault", "vbar_unpin", "vbar_signature_compare"):
        monkeypatch.setattr(comfy_aimdo.model_vbar, name, getattr(memory, name))
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", memory.aimdo_to_tensor)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.cli_args.args, "disable_pinned_memory", True)
    with torch.inference_mode():
        yield net, memory, x, want


def sampler(net, x):
    """() -> (result, weights copied), by compiled blocks."""
    from int8_compile.compile.comfyui.offload import around_block
    from int8_compile.compile.engine import CompiledModule
    from int8_compile.compile.options import CompileOptions

    compiled = CompiledModule(CompileOptions(backend="eager", mark_sizes=True))

    def sample():
        found = copies_of_weights(lambda: compiled.run(net, lambda: net(x), filter_guards=True, passthrough=lambda error: False,
                                                       around_block=around_block))
        assert not compiled.report.failure and compiled.report.last_calls["graph"] == 3
        return found
    sample.report = compiled.report
    return sample


def test_resident_weights_are_used_where_they_lie(dynamic):
    net, memory, x, want = dynamic
    sample = sampler(net, x)
    assert sample()[1] > 0
    for _ in range(2):
        before = memory.faults
        got, copies = sample()
        torch.testing.assert_close(got, want)
        assert copies == 0 and memory.faults - before == 6
        assert not any(memory.pins.values())
    assert sample.report.graphs == 1


class Call:
    """Of one block, in the engine's place. during: called with the block while its weights are there."""

    def __init__(self, block, during):
        self.module, self.during = block, during

    def __call__(self, x):
        self.during(self.module)
        return self.module(x)


@pytest.mark.parametrize("fails", [False, True])
def test_they_stay_pinned_until_their_block_is_done_or_has_failed(dynamic, fails):
    from int8_compile.compile.comfyui.offload import around_block

    net, memory, x, _ = dynamic
    block, seen = net.blocks[1], []

    def during(block):
        layer = block.up
        seen.append((sum(memory.pins.values()), layer.weight.untyped_storage().data_ptr() == memory.bytes.data_ptr(),
                     hasattr(layer, "_v") or hasattr(layer, "_prefetch") or bool(layer.weight_function)))
        if fails:
            raise ZeroDivisionError
    before, weight = dict(vars(block.up)), block.up.weight
    try:
        around_block(Call(block, during))(x)
    except ZeroDivisionError:
        assert fails
    assert seen == [(2, True, False)] and not any(memory.pins.values())
    assert block.up.weight is weight and block.up._v is before["_v"] and not hasattr(block.up, "_prefetch")
    assert block.up.comfy_cast_weights


def test_what_was_taken_away_is_fetched_again(dynamic):
    net, memory, x, want = dynamic
    sample = sampler(net, x)
    for _ in range(3):
        memory.evict()
        torch.testing.assert_close(sample()[0], want)
    assert sample.report.graphs == 1


def test_a_block_that_finds_no_room_is_fetched_at_once_and_each_layer_to_its_own_place(comfy, dynamic, monkeypatch):
    net, memory, x, want = dynamic
    memory.is_full, calls, real = True, itertools.count(), comfy.ops.cast_modules_with_vbar  # a list would be a value of compiled code
    monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", lambda *arguments: (real(*arguments), next(calls))[0])
    sample = sampler(net, x)
    for _ in range(2):
        got, copies = sample()
        torch.testing.assert_close(got, want)
        assert copies <= 6  # to the device
    assert next(calls) == 6 and sample.report.graphs == 1


def test_what_core_has_fetched_before_the_block_is_left_to_core(comfy, dynamic):
    net, memory, x, want = dynamic
    fetched = []

    def prefetch(block):
        layers = [block.up, block.down]
        comfy.ops.cast_modules_with_vbar(layers, None, x.device, None, True)
        fetched.append(layers)
    net.before_block = prefetch
    sample = sampler(net, x)
    sample()
    before = memory.faults
    got, copies = sample()
    torch.testing.assert_close(got, want)
    assert copies == 0 and memory.faults - before == 6 and sum(memory.pins.values()) == 12  # core unpins them
    assert all(layer._prefetch["signature"] for layers in fetched for layer in layers)
