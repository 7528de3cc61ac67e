"""Whatever is changed after a block was compiled, the result is eager's: by torch.compile in this process, and from the compile cache.

The cache's part runs exported programs as they are (everything of the pack but AOTInductor), so that a case takes a second, not twenty;
test_artifacts.py and tests/nodes run real packages. Each change is made, taken back, and what was compiled must then serve again.
"""
from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import logging
import random
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.families import exported_tier

sys.path.insert(0, str(Path(__file__).parent))
import changing_nets as nets
import changing_values
from int8_compile.compile.artifacts import export as aoti
from int8_compile.compile.artifacts.runtime import Cache
from int8_compile.compile.artifacts.store import CacheStore
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions
from toys import difference

pytestmark = pytest.mark.rotating(3)

KEPT = CompileOptions(mark_sizes=True, dynamic=False, background=True)
COMPILED = CompileOptions(mark_sizes=True, dynamic=False, backend="eager")  # dynamo and its guards; what follows them has no say here
TRACED = CompileOptions(mark_sizes=True, dynamic=False, backend="aot_eager")  # nor has Python when it runs


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


class Here:
    """Builds at once in this process, up to the exported program."""

    def __init__(self, store: CacheStore):
        self.store = store
        self.reasons: list[str] = []

    def submit(self, order) -> None:
        logging.disable()  # pytest's handlers would be part of what is traced, and read all names
        try:
            with torch.inference_mode(False):
                self.store.build_once(order.place, order.entry, lambda folder: aoti.build(order.job, folder, tiers=("export",)),
                                      order.replaces is not None)
            order.done("")
        except Exception as error:
            self.reasons.append(f"{type(error).__name__}: {error}")
            order.done(self.reasons[-1])
        finally:
            logging.disable(logging.NOTSET)

    @contextlib.contextmanager
    def sampling(self, device):
        yield


@pytest.fixture(autouse=True)
def exported(monkeypatch):
    for table, value in exported_tier():
        monkeypatch.setitem(table, "export", value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def cached(folder) -> CompiledModule:
    store = CacheStore(folder, folder.parent / "key" / "cache.key")
    return CompiledModule(KEPT, cache=Cache(store, Here(store)))


def run(compiled, net, *args, patched=False, **options):
    return compiled.run(net, lambda: net(*args, **options), filter_guards=not patched, passthrough=lambda error: False)


def inputs(batch=2, tokens=10):
    torch.manual_seed(1)
    return torch.randn(batch, tokens, 32), torch.rand(batch, 32) + 0.5


def set_item(container, key, value):
    def change(net):
        before = container(net)[key] if callable(container) else container[key]
        target = container(net) if callable(container) else container
        target[key] = value(before) if callable(value) and not isinstance(value, types.FunctionType) else value

        def back():
            target[key] = before
        return back
    return change


def set_attribute(owner, name, value):
    """owner: an object, or a function of the net that gives some."""
    def change(net):
        owners = owner(net) if isinstance(owner, types.LambdaType) and owner.__name__ == "<lambda>" else [owner]
        # Of a function vars() has none of its own attributes; slots and cells have no vars() at all.
        spaces = [(o, getattr(o, "__dict__", {})) for o in owners]
        before = [(o, name in space or isinstance(o, types.FunctionType) or not hasattr(o, "__dict__"),
                   space.get(name, getattr(o, name, None))) for o, space in spaces]
        for o in owners:
            setattr(o, name, value)

        def back():
            for o, had, old in before:
                setattr(o, name, old) if had else delattr(o, name)
        return back
    return change


def replace_layer(net):
    """As an object patch puts an INT8 layer there."""
    before = net.blocks[1].second
    torch.manual_seed(5)
    net.blocks[1].second = torch.nn.Linear(64, 32)

    def back():
        net.blocks[1].second = before
    return back


def replace_class(of):
    def change(net):
        module = of(net)
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs) * 2})

        def back():
            module.__class__ = kind
        return back
    return change


def hook(register):
    def change(net):
        handle = register(net)
        return handle.remove
    return change


def double(module, args, out):
    return out * 2


def twice(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


BLOCKS = lambda net: list(net.blocks)  # noqa: E731
CHANGES = {
    "a layer": replace_layer,
    "a layer's class": replace_class(lambda net: net.blocks[1].second),
    "a block's class": replace_class(lambda net: net.blocks[1]),
    "Block.forward": set_attribute(nets.Block, "forward", twice(nets.Block.forward)),
    "a method of the base class": set_attribute(nets.Base, "finish", lambda self, x: x * 3),
    "a method that the base class had": set_attribute(nets.Block, "finish", lambda self, x: x * 3),
    "forward of a subclass of Linear": set_attribute(nets.Layer, "forward", twice(nets.Layer.forward)),
    "nn.Linear.forward": set_attribute(torch.nn.Linear, "forward", twice(torch.nn.Linear.forward)),
    "nn.Linear.forward, wrapped": set_attribute(torch.nn.Linear, "forward", nets.wrapped(torch.nn.Linear.forward)),
    "nn.LayerNorm.forward": set_attribute(torch.nn.LayerNorm, "forward", twice(torch.nn.LayerNorm.forward)),
    "code of a method": set_attribute(lambda net: [nets.Base.finish], "__code__", (lambda self, x: x * 7).__code__),
    "a hook on a block": hook(lambda net: net.blocks[1].register_forward_hook(double)),
    "a hook on a layer": hook(lambda net: net.blocks[1].second.register_forward_hook(double)),
    "a pre-hook on a layer": hook(lambda net: net.blocks[1].second.register_forward_pre_hook(lambda module, args: (args[0] * 2,))),
    "a hook on all modules": hook(lambda net: torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if isinstance(module, torch.nn.LayerNorm) else None)),
    "forward of one block": set_attribute(lambda net: [net.blocks[1]], "forward", lambda x, *args, **kwargs: x * 2),
    "forward of one layer": set_attribute(lambda net: [net.blocks[1].second], "forward", lambda h: h[..., :32]),
    "a method of one block": set_attribute(lambda net: [net.blocks[1]], "finish", lambda x: x * 5),
    "a config object": set_attribute(BLOCKS, "config", nets.Config(gain=2.0)),
    "a config's content": set_attribute(lambda net: [b.config for b in net.blocks], "gain", 3.0),
    "a list in a config": set_item(lambda net: net.blocks[0].config.inner, 0, 2.0),
    "a dict in a list in a config": set_item(lambda net: net.blocks[0].config.inner[1], "deep", 2.0),
    "an enum": set_attribute(BLOCKS, "kind", nets.Kind.DOUBLE),
    "a number": set_attribute(BLOCKS, "gain", 4.0),
    "a class attribute": set_attribute(nets.Block, "slope", 2.0),
    "an attribute before the class's": set_attribute(lambda net: [net.blocks[0]], "slope", 2.0),
    "a list of functions": set_item(lambda net: net.blocks[0].functions, 0, nets.shifted),
    "a nested tuple": set_attribute(BLOCKS, "pairs", ((1.0, 2.0), (3.0, (5.0,)))),
    "a set": set_attribute(BLOCKS, "chosen", {1, 5}),
    "a slice": set_attribute(BLOCKS, "part", slice(0, 16, 1)),
    "another slice": set_attribute(BLOCKS, "part", slice(16, 32)),
    "an attribute by a computed name": set_attribute(BLOCKS, "scale_0", 2.0),
    "a module's dict": set_item(nets.TABLE, "gain", 2.0),
    "a module's list": set_item(nets.LEVELS, 0, 2.0),
    "a module's object": set_attribute(nets.SETTINGS, "gain", 2.0),
    "deep in a module's object": set_item(nets.SETTINGS.nested.depth, 1, (5.0,)),
    "a module's number": set_attribute(nets, "FACTOR", 2.0),
    "a module's enum": set_attribute(nets, "KIND", nets.Kind.DOUBLE),
    "a function in a dict": set_item(nets.ACTIVATIONS, "silu", nets.ACTIVATIONS["relu"]),
    "a module's function": set_attribute(nets, "scaled", lambda x, by=1.0: x * 9),
    "a module's function, wrapped": set_attribute(nets, "scaled", nets.wrapped(nets.scaled)),
    "code of a function": set_attribute(lambda net: [nets.scaled], "__code__", (lambda x, by=1.0: x * 9).__code__),
    "a default": set_attribute(lambda net: [nets.scaled], "__defaults__", (1.5,)),
    "a helper's static method": set_attribute(nets.Rope, "apply", staticmethod(lambda x: x * 2)),
    "a helper's static method, wrapped": set_attribute(nets.Rope, "apply", staticmethod(nets.wrapped(nets.Rope.apply))),
    "a helper's class attribute": set_attribute(nets.Rope, "strength", 2.0),
    "F.silu": set_attribute(F, "silu", twice(F.silu)),
    "F.linear": set_attribute(F, "linear", twice(F.linear)),
    "torch.cat": set_attribute(torch, "cat", twice(torch.cat)),
    "Tensor.tanh": set_attribute(torch.Tensor, "tanh", twice(torch.Tensor.tanh)),
    "training": lambda net: (net.train(), net.eval)[1],
    "parameters' type": lambda net: (net.double(), net.float)[1],
}


def set_bases(kind, *bases):
    def change(net):
        before, kind.__bases__ = kind.__bases__, bases

        def back():
            kind.__bases__ = before
        return back
    return change


def twice_operator(function):
    return lambda value, other: function(function(value, other), 2)


OF = lambda name: lambda net: [getattr(block, name) for block in net.blocks]  # noqa: E731
# Of nets.Reads.
EASILY_MISSED = {
    "LayerNorm.eps": set_attribute(OF("norm"), "eps", 10.0),
    "LeakyReLU.negative_slope": set_attribute(OF("leaky"), "negative_slope", -5.0),
    "Conv2d.padding_mode": set_attribute(OF("conv"), "padding_mode", "circular"),
    "F.layer_norm, which a layer calls": set_attribute(F, "layer_norm", twice(F.layer_norm)),
    "F.leaky_relu, which a layer calls": set_attribute(F, "leaky_relu", twice(F.leaky_relu)),
    "F.gelu, which a layer calls": set_attribute(F, "gelu", twice(F.gelu)),
    "_call_impl of a class": set_attribute(nets.Layer, "_call_impl", twice(nets.Layer._call_impl)),
    "_call_impl of the block's class": set_attribute(nets.Reads, "_call_impl", twice(nets.Reads._call_impl)),
    "_call_impl of one layer": set_attribute(lambda net: [net.blocks[1].second], "_call_impl", lambda x: x * 2),
    "_call_impl of one block": set_attribute(lambda net: [net.blocks[1]], "_call_impl", lambda x, *args, **kwargs: x * 2),
    "_call_impl of all modules": set_attribute(torch.nn.Module, "_call_impl", twice(torch.nn.Module._call_impl)),
    "_wrapped_call_impl of a class": set_attribute(nets.Layer, "__call__", twice(nets.Layer._wrapped_call_impl)),
    "Tensor.__add__": set_attribute(torch.Tensor, "__add__", twice_operator(torch.Tensor.__add__)),
    "Tensor.__mul__": set_attribute(torch.Tensor, "__mul__", twice_operator(torch.Tensor.__mul__)),
    "a slot": set_attribute(OF("slotted"), "gain", 3.0),
    "a slot of a slot of a module's object": set_attribute(nets.SLOTTED.inner, "gain", 3.0),
    "an attribute of a function": set_attribute(nets.marked, "amount", 3.0),
    "a partial": set_attribute(nets, "SCALED", functools.partial(nets.scaled, by=3.0)),
    "a partial's keywords": set_item(nets.SCALED.keywords, "by", 3.0),
    "what is behind a MappingProxyType": set_item(nets.INNER, "gain", 3.0),
    "a MappingProxyType": set_attribute(nets, "VIEW", types.MappingProxyType({"gain": 3.0})),
    "an attribute of an enum's member": set_attribute(nets.Shade.LIGHT, "strength", 3.0),
    "an attribute of a metaclass": set_attribute(nets.Meta, "factor", 3.0),
    "a global of a decorator": set_attribute(nets, "TIMES", 3.0),
    "a global behind a decorator": set_attribute(nets, "SHIFT", 3.0),
    "a global of a lambda": set_attribute(nets, "LAYERS", 3.0),
    "a list in a closure": set_item(nets.CLOSED.__closure__[0].cell_contents, 0, 3.0),
    "a closure": set_attribute(nets.CLOSED.__closure__[0], "cell_contents", [3.0]),
    "a global of a module that forward imports": set_attribute(changing_values, "FACTOR", 3.0),
    "a global that forward imports": set_attribute(changing_values, "EXPONENT", 3.0),
    "what a dotted path leads to": set_attribute(lambda net: [block.nested.depth for block in net.blocks], "gain", 3.0),
    "on the way of a dotted path": set_attribute(OF("nested"), "depth", types.SimpleNamespace(gain=3.0)),
    "bases of a helper": set_bases(nets.Helper, nets.Second),
    "a method that a helper's base class had": set_attribute(nets.Helper, "gain", lambda self: 3.0),
    "a method of a helper's base class": set_attribute(nets.First, "gain", lambda self: 3.0),
    "bases of the block": set_bases(nets.Reads, nets.Other),
}
BREAKS = {
    "a subclass of float": set_attribute(BLOCKS, "level", nets.Level(3.0)),
    "an attribute of a subclass of float": set_attribute(OF("level"), "extra", 3.0),
    "a subclass of str": set_attribute(BLOCKS, "label", nets.Label("other")),
    "a property of a metaclass": set_attribute(nets.Meta, "level", property(lambda cls: 3.0)),
}
BY_TEXT = {
    "a global": set_item(nets.INNER, "gain", 3.0),
    "another global": set_attribute(nets, "INNER", {"gain": 3.0}),
    "a module's global": set_attribute(changing_values, "FACTOR", 3.0),
}
ALL = {nets.Block: CHANGES, nets.Reads: EASILY_MISSED, nets.Breaks: BREAKS, nets.ByText: BY_TEXT}
CASES = [(kind, change, way) for kind, changes in ALL.items() for change in changes for way in ("kept", "compiled")]
UNSEEN = "training", "parameters' type", "a slice"  # no other result


@pytest.mark.rotating
@pytest.mark.parametrize("kind, change, way", CASES, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_change_shows_at_once_and_is_served_again_when_it_is_taken_back(folder, kind, change, way):
    net, x = nets.make(kind), inputs()
    compiled = cached(folder) if way == "kept" else CompiledModule(TRACED if change.startswith("Tensor.") else COMPILED)
    used = "artifact" if way == "kept" else "graph"
    for _ in range(2):
        assert difference(run(compiled, net, *x), net(*x)) < 1e-4
    assert compiled.report.last_calls[used] == 3, (compiled.report, compiled._cache and compiled._cache.builder.reasons)
    before, plain = compiled.report.graphs, net(*x)
    back = ALL[kind][change](net)
    try:
        x64 = tuple(value.to(net.blocks[0].norm.weight.dtype) for value in x)
        assert change in UNSEEN or difference(net(*x64), plain) > 1e-3
        for _ in range(2):
            assert difference(run(compiled, net, *x64), net(*x64)) < 1e-4
    finally:
        back()
    after = compiled.report.graphs
    assert difference(run(compiled, net, *x), net(*x)) < 1e-4
    assert compiled.report.last_calls[used] == 3 and compiled.report.graphs == after
    assert not compiled.report.failure and (way == "kept") == (before == 0)


WHOLE = nets.Truth, nets.Length, nets.Differs, nets.Prints  # read transformer_options as a whole


def refused(compiled) -> str:
    """Why nothing is kept."""
    return "\n".join((*compiled.report.fallbacks, *compiled._cache.builder.reasons))


@pytest.mark.parametrize("kind, reason", [
    (nets.Appends, "it changes a list that it gets"),
    (nets.Collects, "it changes a list that it gets"),
    (nets.Counts, "it changes its attribute calls"),
    (nets.Remembers, "it changes its attribute state"),
    (nets.Random, "it draws random numbers (random)"),
    (nets.Clock, "it reads the clock (time.time)"),
    (nets.Now, "it asks something outside of it (now)"),
    (nets.Unique, "it asks something outside of it (urandom)"),
    (nets.Opens, "it asks something outside of it (open)"),
    (nets.Stats, "it asks something outside of it (stat)"),
    (nets.Identity, "it asks something outside of it (id)"),
    (nets.Process, "it asks something outside of it (getpid)"),
    (nets.Pops, "it changes transformer_options"),
    (nets.Deletes, "it changes transformer_options"),
    (nets.Hands, "it changes transformer_options"),
    (nets.Environment, "it reads an environment variable"),
    (nets.Getenv, "it reads an environment variable"),
    (nets.Index, "the block reads transformer_options['block_index']"),
    (nets.Conds, "the block reads transformer_options['cond_or_uncond']"),
    (nets.Sigmas, "the block reads transformer_options['sigmas']"),
    (nets.Scalar, "which cannot be described"),
    (nets.View, "it returns a part of its input"),
], ids=lambda value: value.__name__ if isinstance(value, type) else "")
def test_what_an_artifact_cannot_do_is_refused_by_name_and_runs_eager(tmp_path, monkeypatch, kind, reason):
    (tmp_path / "file").write_text("2.0")
    monkeypatch.setattr(nets, "FILE", str(tmp_path / "file"))

    def call(net):
        cache, index, found = [None, None, None, 1.0], [0], []
        arguments = {nets.Appends: (cache, index), nets.Collects: (found,)}.get(kind, ())
        options = {"cond_or_uncond": [1, 0]} if kind is nets.Conds else {"a": 1} if kind in (nets.Pops, nets.Deletes) else {}
        random.seed(3)
        result = net(inputs()[0], *arguments, **options)
        return result, index, len(found)
    if kind in (nets.Clock, nets.Now, nets.Unique, nets.Identity):
        def call(net):
            return net(inputs()[0])[:0], 0, 0
    compiled, net, twin = cached(tmp_path / "cache"), nets.make(kind), nets.make(kind)
    for _ in range(3):
        got = compiled.run(net, lambda: call(net), filter_guards=True, passthrough=lambda error: False)
        want = call(twin)
        assert torch.equal(got[0], want[0]) and got[1:] == want[1:]
    assert reason in refused(compiled) and compiled.report.calls["artifact"] == 0
    assert compiled.report.status() == "running uncompiled" and compiled.report.warnings()


@pytest.mark.parametrize("kind", [nets.Counts, nets.Remembers, nets.Random, nets.Environment, nets.Getenv, nets.Index, nets.Conds,
                                  nets.Sigmas, nets.Truth, nets.Length, nets.Flags, nets.Appends, nets.ByBatch, nets.SliceByBatch,
                                  nets.Numbers, nets.Differs, nets.Pops, nets.Deletes, nets.Hands, nets.Opens, nets.Stats],
                         ids=lambda kind: kind.__name__)
def test_torch_compile_in_this_process_has_the_same_effects_as_eager(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(nets, "FILE", str(tmp_path / "file"))

    def call(net, round):
        (tmp_path / "file").write_text(str(10.0 ** round))
        monkeypatch.setenv("INT8_COMPILE_TEST_GAIN", str(round + 1))
        random.seed(round)
        options = [{}, {"a": 1}, {"cond_or_uncond": [1]}, {"cond_or_uncond": [0]}, {}][round]
        arguments = {nets.Appends: ([None, None, None, 1.0], [0]), nets.Numbers: (round + 0.5,)}.get(kind, ())
        bare = {"bare": True} if kind in (*WHOLE, nets.Sigmas) else {}
        if kind in (nets.Flags, nets.Hands):
            bare = {"shared": {}}
        return net(inputs(batch=1 + round % 2)[0], *arguments, **bare, **options)
    net, twin = nets.make(kind), nets.make(kind)
    compiled = CompiledModule(COMPILED)
    for round in range(5):
        got = compiled.run(net, lambda round=round: call(net, round), filter_guards=True, passthrough=lambda error: False)
        assert difference(got, call(twin, round)) < 1e-4, round
    assert not compiled.report.failure


@pytest.mark.parametrize("kind", [nets.Clock, nets.Now, nets.Unique, nets.Identity], ids=lambda kind: kind.__name__)
def test_what_differs_at_each_look_is_no_constant_of_torch_compile(kind):
    net, compiled, x = nets.make(kind, depth=2), CompiledModule(COMPILED), inputs()[0]
    first, second = net.blocks
    results = [compiled.run(net, lambda block=block: block(x), filter_guards=True, passthrough=lambda error: False)
               for block in (first, first, second, second)]
    if kind is nets.Identity:
        assert all(difference(result, block(x)) < 1e-4 for result, block in zip(results, (first, first, second, second)))
    else:
        assert difference(results[0], results[1]) > 0 and difference(results[2], results[3]) > 0


@pytest.mark.parametrize("kind", [nets.Truth, nets.Length, nets.Flags, nets.ByBatch, nets.SliceByBatch, nets.Plain, nets.InPlace, nets.Tied,
                                  nets.Optional, nets.Differs, nets.Prints], ids=lambda kind: kind.__name__)
def test_an_artifact_serves_only_what_it_was_made_of(tmp_path, kind):
    net, twin, compiled = nets.make(kind), nets.make(kind), cached(tmp_path / "cache")
    rounds = [({}, 2), ({"a": 1}, 2), ({}, 2), ({"b": 1}, 1), ({}, 1), ({}, 3)]
    for options, batch in rounds * 2:
        x = inputs(batch)[0]
        arguments = (x.clone(),) if kind is nets.InPlace else ()

        def call(net, x=x, arguments=arguments, options=options):
            given = {"shared": dict(options)} if kind is nets.Flags else {"bare": kind in WHOLE, **options}
            return net(x.clone(), *arguments, **given)
        got = compiled.run(net, lambda: call(net), filter_guards=True, passthrough=lambda error: False)
        assert difference(got, call(twin)) < 1e-4
    assert compiled.report.calls["artifact"] > 0
    if kind is nets.Tied:
        net.blocks[0].second.weight = torch.nn.Parameter(torch.randn(32, 32))
    if kind is nets.Optional:
        net.blocks[0].extra = torch.full((32,), 2.0)
    x = inputs()[0]
    if kind in (nets.Tied, nets.Optional):
        assert difference(run(compiled, net, x), net(x)) < 1e-4


Y, Z = torch.ones(2, 10, 32), torch.full((2, 10, 32), 0.5)


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("kind, calls", [
    (nets.Sized, [((torch.Size([1, 2]),), {}), (((1, 2),), {}), (([1, 2],), {})]),
    (nets.Named, [((nets.Pair(1.0, 2.0),), {}), (((1.0, 2.0),), {})]),
    (nets.Keywords, [((), {"low": 2.0, "high": 3.0}), ((), {"high": 3.0, "low": 2.0}), ((), {"low": 2.0})]),
    (nets.Same, [((Y, Y), {}), ((Y, Z), {}), ((Z, Z), {}), ((Z, Y), {})]),
    (nets.Called, [((nets.scaled,), {}), ((nets.shifted,), {}), ((lambda x: x * 2,), {}), ((lambda x: x * 3,), {})]),
], ids=lambda value: value.__name__ if isinstance(value, type) else "")
def test_a_call_is_served_by_what_was_made_for_calls_of_its_kind(tmp_path, kind, calls, way):
    net, compiled, x = nets.make(kind), cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED), inputs()[0]

    def call(args, kwargs):
        return net.blocks[1](net.blocks[0](x, *args, **kwargs), *args, **kwargs)
    wanted = [call(*given) for given in calls]
    assert all(difference(a, b) > 1e-3 for a, b in itertools.pairwise(wanted))
    for given, want in [*zip(calls, wanted)] * 3:
        got = compiled.run(net, lambda given=given: call(*given), filter_guards=True, passthrough=lambda error: False)
        assert difference(got, want) < 1e-4
    assert not compiled.report.failure and (compiled.report.calls["artifact" if way == "kept" else "graph"]
                                            or (kind is nets.Named and "an argument is a Pair" in refused(compiled)))


@pytest.mark.parametrize("way", ["kept", "compiled"])
def test_inputs_that_share_memory_are_written_as_in_eager(tmp_path, way):
    net = nets.make(nets.InPlace)
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    block = net.blocks[0]

    def both(make):
        got, want = make(), make()
        result = compiled.run(net, lambda: block(*got, transformer_options={}), filter_guards=True, passthrough=lambda error: False)
        expected = block(*want, transformer_options={})
        assert difference(result, expected) < 1e-4
        assert all(difference(a, b) < 1e-4 for a, b in zip(got, want))

    def apart():
        return inputs()[0], inputs()[0] * 2

    def same():
        x = inputs()[0]
        return x, x

    def overlapping():
        y = inputs(tokens=12)[0]
        return y[:, :8], y[:, 4:12]
    for make in (apart, same, overlapping, apart):
        both(make)


def test_a_number_that_differs_from_call_to_call_is_refused_at_once(tmp_path):
    net, compiled = nets.make(nets.Numbers), cached(tmp_path / "cache")
    for number in (0.5, 1.5, 2.5, 0.5):
        x = inputs()[0]
        assert difference(run(compiled, net, x, number), net(x, number)) < 1e-4
    assert "a number among its arguments differs from call to call" in refused(compiled)
    assert len(list(compiled._cache.store.own())) == 1  # nothing is built for nothing


def test_an_attribute_that_is_called_like_a_module_that_a_server_alone_has_loaded(tmp_path, monkeypatch):
    """ComfyUI's args.cuda_malloc: main.py has loaded a module cuda_malloc, with an args, and the builder has not."""
    net, args = nets.make(nets.LikeAModule), inputs()
    assert difference(run(cached(tmp_path / "cache"), net, *args), net(*args)) < 1e-4
    monkeypatch.setitem(sys.modules, "changing_values", module := types.ModuleType("changing_values"))
    module.TABLE = {"gain": 5.0}
    compiled = cached(tmp_path / "cache")
    assert difference(run(compiled, net, *args), net(*args)) < 1e-4
    assert compiled.report.last_calls == {"artifact": 3, "graph": 0, "eager": 0}


def test_a_training_step_through_compiled_blocks_has_eagers_gradients():
    with torch.inference_mode(False):
        net = nets.make(nets.Plain).requires_grad_(True)
        compiled = CompiledModule(COMPILED)
        for _ in range(2):
            x = torch.randn(2, 32, 10, requires_grad=True)
            run(compiled, net, x.tanh().transpose(1, 2)).square().sum().backward()
            got = x.grad.clone()
            x.grad = None
            net(x.tanh().transpose(1, 2)).square().sum().backward()
            assert difference(got, x.grad) < 1e-4
        assert compiled.report.calls["graph"] == 6 and not compiled.report.failure


def test_compile_stays_on_for_inference_tensors_under_no_grad():
    net, compiled = nets.make(nets.Plain), CompiledModule(COMPILED)
    x = torch.randn(2, 32, 10).transpose(1, 2)
    with torch.inference_mode(False), torch.no_grad():
        assert difference(run(compiled, net, x), net(x)) < 1e-4
    assert not compiled.report.failure and compiled.report.last_calls["graph"] == 3


def raise_one():
    raise ValueError("the model's own, once")


ERRORS = {"raise": (raise_one, ValueError), "int": (lambda: int("x"), ValueError), "dict": (lambda: {}["x"], KeyError),
          "tensor": (lambda: torch.ones(2) @ torch.ones(3), RuntimeError), "next": (lambda: next(iter(())), StopIteration)}


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["model", "block"])
def test_an_error_that_the_model_raises_once_is_raised_and_compile_goes_on(tmp_path, where, error, way):
    raises, kind = ERRORS[error]

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.fails = nets.make(nets.Fails), None

        def forward(self, x):
            x = self.net(x)
            if self.fails:
                self.fails()
            return x
    net, compiled = Wrapper(), cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    x = inputs()[0]
    for _ in range(2):
        run(compiled, net, x)
    owner = net if where == "model" else net.net.blocks[1]
    owner.fails = raises
    with pytest.raises(kind):
        run(compiled, net, x)
    owner.fails = None
    assert difference(run(compiled, net, x), net(x)) < 1e-4
    assert compiled.report.last_calls["artifact" if way == "kept" else "graph"] == 3 and not compiled.report.failure


def test_two_models_that_call_each_other_from_two_threads_come_back():
    first, second = nets.make(nets.Plain), nets.make(nets.Plain)
    compiled = {id(net): CompiledModule(COMPILED) for net in (first, second)}
    barrier, results = threading.Barrier(2), []

    def outer(net, other):
        def call():
            barrier.wait(30)
            return net(x) + run(compiled[id(other)], other, x)
        with torch.inference_mode():
            results.append(difference(compiled[id(net)].run(net, call, filter_guards=True, passthrough=lambda e: False), net(x) + other(x)))
    x = inputs()[0]
    threads = [threading.Thread(target=outer, args=pair, daemon=True) for pair in ((first, second), (second, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2 and max(results) < 1e-4


def test_a_run_in_a_run_of_the_same_model_keeps_the_recompile_limit():
    net, compiled, limits = nets.make(nets.Plain), CompiledModule(COMPILED), []

    def call():
        result = run(compiled, net, x)
        result = net(result)
        limits.append(torch._dynamo.config.recompile_limit)
        return result
    x = inputs()[0]
    compiled.run(net, call, filter_guards=True, passthrough=lambda error: False)
    assert limits == [COMPILED.cache_size_limit]


def test_another_packs_mark_does_not_become_ours():
    net, compiled = nets.make(nets.Plain), CompiledModule(COMPILED)
    x = inputs()[0]
    run(compiled, net, x)
    torch._dynamo.maybe_mark_dynamic(x, 2)
    y = inputs()[0]
    run(compiled, net, y)
    assert 2 not in y._dynamo_weak_dynamic_indices


def test_methods_that_are_patched_anew_each_time_with_the_same_content_compile_once(monkeypatch):
    net, compiled, x = nets.make(nets.Plain), CompiledModule(COMPILED), inputs()[0]

    def patch(factor):
        original = nets.Plain.body
        monkeypatch.setattr(nets.Plain, "body", lambda self, x: original(self, x) * factor)
    for _ in range(3):
        patch(2.0)
        assert difference(run(compiled, net, x), net(x)) < 1e-4
        monkeypatch.undo()
    assert compiled.report.graphs == 1
    for factor in range(40):
        patch(float(factor + 3))
        assert difference(run(compiled, net, x), net(x)) < 1e-4
        monkeypatch.undo()
    assert compiled.report.graphs < 20 and any("was changed more than" in text for text in compiled.report.fallbacks)
    assert compiled.report.status() == "running uncompiled"
    assert difference(run(compiled, net, x), net(x)) < 1e-4


class Doubling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is F.gelu else result


@pytest.mark.parametrize("way", ["kept", "compiled"])
def test_a_mode_that_changes_torchs_functions_changes_the_result(tmp_path, way):
    net, compiled, x = nets.make(nets.Plain), cached(tmp_path / "cache") if way == "kept" else CompiledModule(TRACED), inputs()[0]
    plain = net(x)
    for _ in range(2):
        assert difference(run(compiled, net, x), plain) < 1e-4
    with Doubling():
        assert difference(net(x), plain) > 1e-3
        for _ in range(2):
            assert difference(run(compiled, net, x), net(x)) < 1e-4
    assert difference(run(compiled, net, x), plain) < 1e-4
    assert compiled.report.last_calls["artifact" if way == "kept" else "graph"] == 3 and not compiled.report.failure


class Alternates(nets.Net):
    """Sets what its blocks read before each of them."""

    def __init__(self, change):
        super().__init__(depth=2)
        self.change = change

    def forward(self, x, *args, **options):
        for index, block in enumerate(self.blocks):
            back = self.change(index)(self)
            x = block(x, *args, transformer_options=options)
            back()
        return x


BETWEEN = {
    "a global": lambda index: set_attribute(nets, "FACTOR", index + 1.0),
    "a table": lambda index: set_item(nets.TABLE, "gain", index + 1.0),
    "an attribute": lambda index: set_attribute(BLOCKS, "gain", index + 1.0),
    "a config": lambda index: set_attribute(lambda net: [block.config for block in net.blocks], "gain", index + 1.0),
    "a class attribute": lambda index: set_attribute(nets.Block, "slope", index + 1.0),
    "a class attribute of a helper": lambda index: set_attribute(nets.Rope, "strength", index + 1.0),
    "an attribute of an enum": lambda index: set_attribute(BLOCKS, "kind", list(nets.Kind)[index % 2]),
    "a default": lambda index: set_attribute(lambda net: [nets.scaled], "__defaults__", (index + 1.0,)),
}
METHODS = ("a default", "compiled"),  # functions are looked at once a step there


@pytest.mark.rotating
@pytest.mark.parametrize("change, way", [case for case in itertools.product(BETWEEN, ("kept", "compiled")) if case not in METHODS])
def test_what_the_model_itself_changes_from_block_to_block_is_refused_or_right(tmp_path, change, way):
    torch.manual_seed(0)
    net, x = Alternates(BETWEEN[change]).eval().requires_grad_(False), inputs()
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    want = net(*x)
    assert difference(nets.make(depth=2)(*x), want) > 1e-3
    for _ in range(4):
        assert difference(run(compiled, net, *x), want) < 1e-4
    assert not compiled.report.failure


def test_a_block_that_was_looked_at_may_go_before_what_was_built_for_it_is_loaded(tmp_path):
    net, compiled, x = nets.make(nets.Plain), cached(tmp_path / "cache"), inputs()[0]
    run(compiled, net, x)
    for index in range(3):
        net.blocks[index] = copy.deepcopy(net.blocks[index])
        net.blocks[index].first.weight.mul_(2)
    gc.collect()
    assert difference(run(compiled, net, x), net(x)) < 1e-4
    assert compiled.report.last_calls["artifact"] == 3 and not compiled.report.failure


def test_the_status_says_that_a_model_runs_uncompiled_while_artifacts_are_not_allowed(tmp_path):
    net, compiled, x = nets.make(nets.Plain), cached(tmp_path / "cache"), inputs()[0]
    for _ in range(2):
        run(compiled, net, x)
    assert compiled.report.status().startswith("ready")
    run(compiled, net, x, patched=True)
    assert compiled.report.status() == "running uncompiled"
    assert compiled.report.last_calls == {"artifact": 0, "graph": 0, "eager": 3}
    run(compiled, net, x)
    assert compiled.report.status().startswith("ready")


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("missing", ["a buffer", "a bias", "a layer's own tensors"])
def test_a_weight_that_is_missing_is_missed(tmp_path, monkeypatch, missing, way):
    net = nets.make(nets.Packs if missing == "a layer's own tensors" else nets.Optional)
    if missing == "a buffer":
        net.blocks[1].extra = torch.full((32,), 2.0)
    compiled, x = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED), inputs()[0]
    plain = net(x)
    for _ in range(2):
        assert difference(run(compiled, net, x), plain) < 1e-4
    with monkeypatch.context() as patch:
        if missing == "a buffer":
            patch.delitem(net.blocks[1]._buffers, "extra")
        elif missing == "a bias":
            patch.setitem(net.blocks[1].first._parameters, "bias", None)
        else:
            patch.setattr(nets, "PACKED", False)
        assert difference(net(x), plain) > 1e-3
        for _ in range(2):
            assert difference(run(compiled, net, x), net(x)) < 1e-4
    assert difference(run(compiled, net, x), plain) < 1e-4
    assert not compiled.report.failure and not compiled.report.last_calls["eager"]
