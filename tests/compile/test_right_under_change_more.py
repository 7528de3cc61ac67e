"""More of the same promise: whatever is changed, the result is eager's. See test_right_under_change."""
from __future__ import annotations

import builtins
import functools
import gc
import importlib
import math
import operator
import os
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import changing_nets as nets
from int8_compile.compile.artifacts import artifact, source_guards
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.events import Events
from int8_compile.compile.options import CompileOptions
from test_right_under_change import COMPILED, KEPT, TRACED, Here, cached, exported, inference, inputs, refused, run  # noqa: F401
from toys import difference

pytestmark = pytest.mark.rotating(3)


def test_a_thread_that_a_run_starts_and_waits_for_may_call_the_same_model():
    net, compiled, x, results = nets.make(nets.Plain), CompiledModule(COMPILED), inputs()[0], []

    def inner():
        with torch.inference_mode():
            results.append(run(compiled, net, x))

    def call():
        thread = threading.Thread(target=inner, daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
        return net(x)
    for _ in range(2):
        got = compiled.run(net, call, filter_guards=True, passthrough=lambda error: False)
        assert difference(got, net(x)) < 1e-4
    assert len(results) == 2 and all(difference(result, net(x)) < 1e-4 for result in results)
    assert compiled.report.last_calls["graph"] == 3


def test_why_an_artifact_is_not_used_is_in_the_report(tmp_path):
    net, compiled, x = nets.make(), cached(tmp_path / "cache"), inputs()
    for _ in range(2):
        run(compiled, net, *x)
    assert not compiled.report.fallbacks
    net.blocks[0].gain = 2.0
    nets.scaled.__defaults__ = (2.0,)
    try:
        run(compiled, net, *x)
    finally:
        nets.scaled.__defaults__ = (1.0,)
    run(compiled, net, *x)
    code, attribute = compiled.report.fallbacks
    assert code.endswith("is not the code that its artifact was made of: running uncompiled while it is so.")
    assert attribute == ("Block: gain is not as in the blocks that its artifact was made of: running uncompiled while it is so.")
    assert code in compiled.report.text() and attribute in compiled.report.text()


def test_why_an_artifact_is_not_used_is_in_the_report_only_while_it_is_so(tmp_path, monkeypatch):
    net, compiled, x = nets.make(), cached(tmp_path / "cache"), inputs()
    for _ in range(2):
        run(compiled, net, *x)
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(nets.scaled, "__defaults__", (2.0,))
            run(compiled, net, *x)
        assert [text for text in compiled.report.fallbacks if "is not the code that its artifact was made of" in text]
        run(compiled, net, *x)
        assert compiled.report.last_calls["artifact"] == len(net.blocks) and not compiled.report.fallbacks


def test_what_was_built_of_other_code_is_built_again_while_steps_go_on(tmp_path, monkeypatch):
    """After an update of a pack: the old entry is there until the builder has finished."""
    (tmp_path / "edited_net.py").write_text("import changing_nets\n\n\nclass Edited(changing_nets.Small):\n"
                                            "    def forward(self, x, transformer_options=None):\n        return self.body(x)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("edited_net")
    compiled, x = cached(tmp_path / "cache"), inputs()[0]
    for _ in range(2):
        run(compiled, nets.make(module.Edited), x)
    assert compiled.report.last_calls["artifact"] == 3
    with (tmp_path / "edited_net.py").open("a") as file:
        file.write("# edited\n")
    monkeypatch.delitem(sys.modules, "edited_net")
    source_guards._file_digest.cache_clear()
    module = importlib.import_module("edited_net")
    net, compiled, orders = nets.make(module.Edited), cached(tmp_path / "cache"), []
    build = compiled._cache.builder.submit
    monkeypatch.setattr(compiled._cache.builder, "submit", orders.append)
    for batch in (2, 2, 1, 2):
        x = inputs(batch=batch)[0]
        assert difference(run(compiled, net, x), net(x)) < 1e-5 and compiled.report.last_calls["eager"] == 3
    (order,) = orders
    build(order)
    for batch in (2, 1):
        x = inputs(batch=batch)[0]
        assert difference(run(compiled, net, x), net(x)) < 1e-5 and compiled.report.last_calls["artifact"] == 3
    assert not compiled.report.fallbacks


def test_a_loaded_artifact_ends_only_what_was_said_of_its_own_region():
    events = Events("Compile Model", background=True)
    events.in_step = True
    events.fall_back("something else")
    for region in ("Block", "Block", "Other"):
        events.on_artifact("not used", region, f"reason {len(events.report.fallbacks)}")
    events.on_artifact("loaded", "Block", "0123")
    kept, other = events.report.fallbacks
    assert kept == "something else" and other.startswith("Other: reason 3")


class Zeros(nets.Small):
    """Reads numbers from everywhere; copysign tells 0.0 from -0.0."""

    def __init__(self):
        super().__init__()
        self.own, self.table = 0.0, {"inner": [0.0]}

    def forward(self, x, number, transformer_options=None):
        h = self.body(x).abs()
        for value in (self.own, self.table["inner"][0], number, transformer_options.get("strength", 1.0), ZERO[0]):
            h = h + 0.3 * torch.copysign(h, torch.full_like(h, value))
        return h


ZERO = [0.0]


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("place", ["argument", "option", "attribute", "nested", "global"])
def test_a_zero_of_the_other_sign_is_another_number(tmp_path, place, way):
    net = nets.make(Zeros)
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    x = inputs()[0]
    for first, is_first in ((0.0, True), (-0.0, False)):
        for value in (first, first, -first, first):
            for block in net.blocks:
                block.own = value if place == "attribute" else 0.0
                block.table["inner"][0] = value if place == "nested" else 0.0
            ZERO[0] = value if place == "global" else 0.0
            arguments = (value if place == "argument" else 0.0,)
            options = {"strength": value} if place == "option" else {}
            assert difference(run(compiled, net, x, *arguments, **options), net(x, *arguments, **options)) < 1e-4
        if is_first:
            assert compiled.report.last_calls["artifact" if way == "kept" else "graph"] == 3
    ZERO[0] = 0.0


class Switched(nets.Small):
    """Its class says how it works, as comfy_cast_weights of ComfyUI's layers: an offload sets it on one, and may leave it there."""

    doubles = False

    def forward(self, x, transformer_options=None):
        h = self.body(x)
        return h * 2 if self.doubles else h


@pytest.mark.parametrize("way", ["kept", "compiled"])
def test_an_attribute_put_back_as_its_class_has_it_changes_nothing(tmp_path, monkeypatch, way):
    net, x = nets.make(Switched), inputs()[0]
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)

    def right(kind):
        for _ in range(2):
            assert difference(run(compiled, net, x), net(x)) < 1e-4
        return compiled.report.last_calls[kind]
    kind = "artifact" if way == "kept" else "graph"
    assert right(kind) == 3
    net.blocks[0].doubles = True
    right(kind)
    kept = len(compiled.report.artifacts)
    net.blocks[0].doubles = False
    assert right(kind) == 3 and len(compiled.report.artifacts) == kept
    # The class is what counts where the block has none of its own, and not where it has.
    monkeypatch.setattr(Switched, "doubles", True)
    right(kind)
    del net.blocks[0].doubles
    right(kind)
    monkeypatch.undo()
    assert right(kind) == 3


class Between(torch.nn.Module):
    """Changes, from one step on, what its blocks read before each of them."""

    def __init__(self, kind, change):
        super().__init__()
        self.blocks = nets.make(kind).blocks
        self.change, self.step, self.start = change, 0, 10 ** 6

    def forward(self, x):
        self.step += 1
        for index, block in enumerate(self.blocks):
            if self.step >= self.start:
                self.change(index + 1.0)
            x = block(x, transformer_options={})
        return x


STATE = {"gain": 1.0}
LIST = [1.0]


class Settings:
    gain = 1.0


SETTINGS = Settings()


class Stateful(nets.Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * STATE["gain"] * LIST[0] * SETTINGS.gain * Settings.gain * nets.FACTOR * nets.TABLE["gain"] * self.slope

    slope = 1.0


BETWEEN = {
    "a dict": (Stateful, lambda value: STATE.update(gain=value)),
    "a list": (Stateful, lambda value: LIST.__setitem__(0, value)),
    "an object": (Stateful, lambda value: setattr(SETTINGS, "gain", value)),
    "a class attribute": (Stateful, lambda value: setattr(Settings, "gain", value)),
    "an attribute of the block's class": (Stateful, lambda value: setattr(Stateful, "slope", value)),
    "another module's number": (Stateful, lambda value: setattr(nets, "FACTOR", value)),
    "another module's dict": (Stateful, lambda value: nets.TABLE.update(gain=value)),
    "the environment": (nets.Getenv, lambda value: os.environ.update(INT8_COMPILE_TEST_GAIN=str(value))),
    "the environment, by get": (nets.Environment, lambda value: os.environ.update(INT8_COMPILE_TEST_GAIN=str(value))),
    "what is in the environment": (nets.InEnvironment, lambda value: os.environ.pop("INT8_COMPILE_TEST_GAIN", None) if value == 1.0 else
                                   os.environ.update(INT8_COMPILE_TEST_GAIN="")),
}


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("what", BETWEEN)
@pytest.mark.parametrize("start", [1, 6])
def test_what_a_model_sets_between_its_blocks_counts_at_each_of_them(tmp_path, what, start, way):
    kind, change = BETWEEN[what]
    vars(SETTINGS).clear()  # what the class has counts, until the object is given the same
    net = Between(kind, change)
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    x = inputs()[0]
    try:
        net.start = start
        for step in range(1, 9):
            net.step = step - 1
            got = run(compiled, net, x)
            net.step = step - 1
            change(1.0)
            assert difference(got, net(x)) < 1e-4, step
            change(1.0)
            if step == 5 and start == 6 and kind is Stateful:
                assert compiled.report.last_calls["artifact" if way == "kept" else "graph"] == 3
    finally:
        change(1.0)
        os.environ.pop("INT8_COMPILE_TEST_GAIN", None)


def exchange(name, make):
    """The dict that a module of a block keeps under name for another one."""
    def change(net):
        state = net.blocks[1].second.__dict__
        before = state[name]
        state[name] = make(net, dict(before))

        def back():
            state[name] = before
        return back
    return change


def exchange_state(net):
    layer = net.blocks[1].second
    before = layer.__dict__
    layer.__dict__ = {**before, "_parameters": other_weights(net, before["_parameters"])}

    def back():
        layer.__dict__ = before
    return back


def other_weights(net, weights):
    return {name: torch.nn.Parameter(tensor * 2, requires_grad=False) for name, tensor in weights.items()}


def exchange_modules(net):
    block = net.blocks[1]
    before = block.__dict__["_modules"]
    torch.manual_seed(7)
    block.__dict__["_modules"] = {**before, "second": torch.nn.Linear(64, 32)}

    def back():
        block.__dict__["_modules"] = before
    return back


def compile_inside(net):
    layer = net.blocks[1].second
    layer._compiled_call_impl = lambda *args: layer._call_impl(*args) * 2

    def back():
        layer._compiled_call_impl = None
    return back


def compile_block(net):
    block = net.blocks[1]
    block._compiled_call_impl = lambda *args, **kwargs: block._call_impl(*args, **kwargs) * 2

    def back():
        block._compiled_call_impl = None
    return back


CHANGES = {
    "parameters": exchange("_parameters", other_weights),
    "hooks": exchange("_forward_hooks", lambda net, hooks: {0: lambda module, args, out: out * 2}),
    "pre-hooks": exchange("_forward_pre_hooks", lambda net, hooks: {0: lambda module, args: (args[0] * 2,)}),
    "modules": exchange_modules,
    "all of a module": exchange_state,
    "the compiled call of a layer": compile_inside,
    "the compiled call of a block": compile_block,
}


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_holds_a_modules_parts_may_be_exchanged_as_a_whole(tmp_path, change, way):
    net, x = nets.make(), inputs()
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    used = "artifact" if way == "kept" else "graph"
    for _ in range(2):
        assert difference(run(compiled, net, *x), net(*x)) < 1e-4
    back = CHANGES[change](net)
    for _ in range(2):
        assert difference(run(compiled, net, *x), net(*x)) < 1e-4
    back()
    assert difference(run(compiled, net, *x), net(*x)) < 1e-4
    assert compiled.report.last_calls[used] == 3 and not compiled.report.failure


@pytest.mark.parametrize("way", ["kept", "compiled"])
def test_a_block_that_is_replaced_and_a_model_that_is_deleted_are_freed_at_once(tmp_path, way):
    net, x = nets.make(), inputs()
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    for _ in range(2):
        run(compiled, net, *x)
    gc.collect()
    old = [weakref.ref(value) for value in (net.blocks[1], net.blocks[1].second, net.blocks[1].second.weight)]
    net.blocks[1] = nets.Block().requires_grad_(False).eval()
    gc.collect()  # dynamo's own
    assert not [reference() for reference in old if reference() is not None]
    assert difference(run(compiled, net, *x), net(*x)) < 1e-4
    gc.collect()
    old = [weakref.ref(value) for value in (net, *net.modules(), *net.parameters())]
    del net
    gc.collect()
    assert not [reference() for reference in old if reference() is not None]


class Gain:
    def __init__(self):
        self.value = 1.0


@functools.lru_cache
def kept_gain():
    return Gain()


class Cached(nets.Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * kept_gain().value


class Registry:
    @classmethod
    @functools.lru_cache(None)
    def kept_gain(cls):
        return Gain()


class CachedMethod(nets.Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * Registry.kept_gain().value


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("kind, get", [(Cached, kept_gain), (CachedMethod, Registry.kept_gain)], ids=["function", "method"])
def test_an_object_behind_lru_cache_may_change(tmp_path, kind, get, way):
    net, x = nets.make(kind), inputs()[0]
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    get().value = 3.0
    for value in (3.0, 3.0, 2.0, 1.0):
        get().value = value
        assert difference(run(compiled, net, x), net(x)) < 1e-4
    assert not compiled.report.failure
    if way == "kept" or kind is Cached:  # dynamo itself does not look through a method
        assert "keeps its results (functools.lru_cache)" in (refused(compiled) if way == "kept" else compiled.report.text())


class Attributes(nets.Small):
    def forward(self, x, transformer_options=None):
        h = self.body(x) * getattr(self.first.weight, "strength", 1.0) * getattr(x, "strength", 1.0)
        return h * self.second.bias.strength if hasattr(self.second.bias, "strength") else h


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("first", [None, 2.0])
@pytest.mark.parametrize("place", ["weight", "bias", "input"])
def test_what_is_put_on_a_tensor_counts(tmp_path, place, first, way):
    net = nets.make(Attributes)
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    for value in (first, first, 3.0, 4.0, None, 5.0, None):
        x = inputs()[0]
        owners = {"weight": [b.first.weight for b in net.blocks[:2]], "bias": [net.blocks[1].second.bias], "input": [x]}[place]
        for owner in owners:
            owner.__dict__.pop("strength", None)
            if value is not None:
                owner.strength = value
        assert difference(run(compiled, net, x), net(x)) < 1e-4, value
    if first is None:
        assert compiled.report.last_calls["artifact" if way == "kept" else "graph"] == 3


def scale(x):
    return x * math.pi * torch.pi * divmod(7, 3)[0]


def offset(x):
    return x * OFFSET  # noqa: F821 (another pack's builtin)


class Constants(nets.Small):
    def forward(self, x, transformer_options=None):
        return scale(self.body(x))


class Offset(nets.Small):
    def forward(self, x, transformer_options=None):
        return offset(self.body(x))


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("owner, name, value", [(torch, "pi", 3.0), (math, "pi", 3.0), (builtins, "divmod", lambda a, b: (9, 9)),
                                                (builtins, "OFFSET", 2.0)], ids=["torch.pi", "math.pi", "a builtin", "a new builtin"])
def test_constants_and_builtins_may_be_replaced(tmp_path, monkeypatch, owner, name, value, way):
    monkeypatch.setattr(builtins, "OFFSET", 1.0, raising=False)
    net, x = nets.make(Offset if name == "OFFSET" else Constants), inputs()[0]
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    before = getattr(owner, name)
    for now in (before, before, value, value, before):
        monkeypatch.setattr(owner, name, now)
        assert difference(run(compiled, net, x), net(x)) < 1e-4
    if way == "kept" or name != "OFFSET":  # which dynamo cannot compile
        assert compiled.report.last_calls["artifact" if way == "kept" else "graph"] == 3 and not compiled.report.failure


def graphs_and_sizes() -> list:
    """Torch's graphs, and what it knows of sizes, that are alive."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), (torch.fx.GraphModule, ShapeEnv))]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_a_model_compiled_is_freed_with_it(backend):
    counts, others = [], []
    for _ in range(4):
        net, x = nets.make(nets.Plain), inputs()[0]
        compiled = CompiledModule(CompileOptions(mark_sizes=True, dynamic=False, backend=backend))
        for _ in range(2):
            run(compiled, net, x)
        assert compiled.report.last_calls["graph"] == 3
        del net, compiled
        # What is alive after the first one is held, so that what other tests have left does not come and go.
        others = others or graphs_and_sizes()
        known = set(map(id, others))
        counts.append(sum(id(item) not in known for item in graphs_and_sizes()))
    assert counts[1] == counts[2] == counts[3] < 3


class WritesContiguous(nets.Small):
    def forward(self, x, transformer_options=None):
        y = x.contiguous()
        y += self.body(x)
        return y * 2


class WritesTransposed(nets.Small):
    """Into its input, where that is contiguous once it is transposed."""

    def forward(self, x, transformer_options=None):
        y = x.transpose(1, 2).contiguous()
        y += 1
        return self.body(y.transpose(1, 2))


class WritesReshaped(nets.Small):
    def forward(self, x, transformer_options=None):
        y = x.reshape(-1, x.shape[-1])
        y.mul_(2)
        return self.body(x)


class ReturnsContiguous(nets.Small):
    def forward(self, x, transformer_options=None):
        return x.contiguous(), self.body(x)


class ReturnsTransposed(nets.Small):
    def forward(self, x, transformer_options=None):
        return x.transpose(1, 2).contiguous(), self.body(x)


class WritesBelowBreak(nets.Small):
    def forward(self, x, transformer_options=None):
        y = x.transpose(1, 2).contiguous()
        torch._dynamo.graph_break()
        y += 1
        return self.body(y.transpose(1, 2))


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("kind", [WritesContiguous, WritesTransposed, WritesReshaped, ReturnsContiguous, ReturnsTransposed,
                                  WritesBelowBreak], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("first", ["dense", "loose"])
def test_what_is_written_by_layout_is_written_where_eager_writes_it(tmp_path, kind, first, way):
    net = nets.make(kind)
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    block = net.blocks[0]

    def dense():
        return inputs()[0]

    def loose():
        return inputs()[0].transpose(1, 2).contiguous().transpose(1, 2)

    def sliced():
        return torch.cat([inputs()[0]] * 2, -1)[..., :32]

    def call(x):
        found = block(x, transformer_options={})
        found[0].add_(1)  # the caller's, who may write into what it got
        return found
    for make in ((dense, loose) if first == "dense" else (loose, dense)) * 2 + (sliced, loose, dense):
        got, want = make(), make()
        result = compiled.run(net, lambda got=got: call(got), filter_guards=True, passthrough=lambda error: False)
        expected = call(want)
        for one, other in zip((*result, got), (*expected, want)):
            assert difference(one, other) < 1e-4, make.__name__
    assert not compiled.report.failure


class Marked(nets.Small):
    def forward(self, x, y, transformer_options=None):
        return self.body(x) + (torch.view_as_real(y * (1 + 2j)).sum(-1) if y.is_complex() else y)


@pytest.mark.parametrize("bit", ["neg", "conj"])
def test_a_tensor_that_is_negated_or_conjugated_by_a_bit_is_read_so(tmp_path, monkeypatch, bit):
    load = artifact.LOADERS["export"]

    def by_address(entry, device):
        run = load(entry, device)
        # As a package takes its inputs.
        return lambda values: run([torch.empty(0, dtype=value.dtype).set_(value.untyped_storage(), value.storage_offset(), value.shape,
                                                                          value.stride()) for value in values])
    monkeypatch.setitem(artifact.LOADERS, "export", by_address)
    net, compiled, x = nets.make(Marked), cached(tmp_path / "cache"), inputs()[0]
    if bit == "neg":
        plain, marked = -x, torch._neg_view(x)
    else:
        plain = torch.complex(x, x.roll(1, -1))
        marked = plain.conj()
    assert marked.is_contiguous() and (marked.is_neg() or marked.is_conj())
    for y in (plain, plain, marked, plain):
        assert difference(run(compiled, net, x, y), net(x, y)) < 1e-4
        got = compiled.report.last_calls.get("artifact")
    assert got == 3 and not compiled.report.failure


ALIAS = getattr


class Part(torch.nn.Module):
    pass


class ByNames(nets.Small):
    """Reads an attribute by a name that its code does not have, through what is no call of getattr."""

    def __init__(self):
        super().__init__()
        self.part, self.path = Part(), ["part", "gain"]
        self.part.gain = 1.0

    def forward(self, x, transformer_options=None):
        return self.body(x) * self.read()


class Reduced(ByNames):
    def read(self):
        return functools.reduce(getattr, self.path, self)


class Mapped(ByNames):
    def read(self):
        return next(map(getattr, [self.part], self.path[1:]))


class Renamed(ByNames):
    def read(self):
        get = getattr
        return get(self.part, self.path[1])


class RenamedGlobally(ByNames):
    def read(self):
        return ALIAS(self.part, self.path[1])


class OfBuiltins(ByNames):
    def read(self):
        return builtins.getattr(self.part, self.path[1])


class ByGetter(ByNames):
    def read(self):
        return operator.attrgetter(self.path[1])(self.part)


@pytest.mark.parametrize("way", ["kept", "compiled"])
@pytest.mark.parametrize("kind", [Reduced, Mapped, Renamed, RenamedGlobally, OfBuiltins, ByGetter], ids=lambda kind: kind.__name__)
def test_getattr_may_be_used_as_a_value(tmp_path, kind, way):
    net, x = nets.make(kind), inputs()[0]
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED)
    for gain in (1.0, 1.0, 3.0, 1.0):
        for block in net.blocks:
            block.part.gain = gain
        assert difference(run(compiled, net, x), net(x)) < 1e-4
    assert compiled.report.last_calls["artifact" if way == "kept" else "graph"] == 3 and not compiled.report.failure


class DefaultDtype(nets.Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * torch.ones(1).element_size()


class MathAttention(nets.Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (2 if torch.backends.cuda.math_sdp_enabled() else 7)


class Deterministic(nets.Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (2 if torch.are_deterministic_algorithms_enabled() else 7)


@pytest.mark.parametrize("kind, setter, values", [
    (DefaultDtype, torch.set_default_dtype, (torch.float32, torch.float64)),
    (MathAttention, torch.backends.cuda.enable_math_sdp, (True, False)),
    (Deterministic, torch.use_deterministic_algorithms, (False, True)),
], ids=["default dtype", "sdp", "deterministic"])
def test_torchs_settings_may_change_between_steps(tmp_path, kind, setter, values):
    net, compiled, x = nets.make(kind), cached(tmp_path / "cache"), inputs()[0]
    before, after = values
    try:
        for value in (before, before, after, after, before):
            setter(value)
            assert difference(run(compiled, net, x), net(x)) < 1e-4
            assert value is before or "torch's settings" in compiled.report.text()
    finally:
        setter(before)
    assert compiled.report.last_calls["artifact"] == 3 and not compiled.report.failure


class OfTorch(nets.Small):
    """Calls functions and methods of torch by all ways."""

    def __init__(self):
        super().__init__()
        self.act, self.conv, self.silu = torch.nn.GELU(), torch.nn.Conv1d(10, 10, 1), torch.nn.SiLU()

    def forward(self, x, transformer_options=None):
        h = self.conv(self.act(self.first(x)))
        return self.second(F.softplus(h) + self.silu(h) + torch.tanh(h).abs() * h) - h


class Activations:
    gelu = staticmethod(lambda x, approximate="none": x * 3)


ANOTHER = {  # of torch's own
    "GELU.forward": (torch.nn.GELU, "forward", torch.nn.Identity.forward),
    "Linear.forward": (torch.nn.Linear, "forward", torch.nn.Identity.forward),
    "Conv1d._conv_forward": (torch.nn.Conv1d, "_conv_forward", lambda self, x, weight, bias: x * 2),
    "Tensor.abs": (torch.Tensor, "abs", torch.Tensor.neg),
    "Tensor.__mul__": (torch.Tensor, "__mul__", torch.Tensor.__add__),
    "F.softplus, a builtin": (F, "softplus", F.gelu),
    "F.softplus": (F, "softplus", F.relu),
    "F.silu, which a layer calls": (F, "silu", F.relu),
    "torch.tanh": (torch, "tanh", torch.sigmoid),
    "F of a layer's module": (torch.nn.modules.activation, "F", type("F", (), {**vars(F), **vars(Activations)})),
}


@pytest.mark.parametrize("way", ["kept", "compiled", "traced"])
@pytest.mark.parametrize("what", ANOTHER)
def test_a_function_of_torch_may_be_replaced_by_another_of_torchs(tmp_path, what, way):
    net, x = nets.make(OfTorch), inputs()[0]
    compiled = cached(tmp_path / "cache") if way == "kept" else CompiledModule(COMPILED if way == "compiled" else TRACED)
    owner, name, value = ANOTHER[what]
    had, before, plain = name in vars(owner), getattr(owner, name), net(x)
    for step, now in enumerate((before, before, value, value, before, before)):
        if now is value or had:
            setattr(owner, name, now)
        elif name in vars(owner):
            delattr(owner, name)
        try:
            want = net(x)
            assert (difference(want, plain) > 1e-3) == (now is value)
            assert difference(run(compiled, net, x), want) < 1e-4, step
        finally:
            if had:
                setattr(owner, name, before)
            elif name in vars(owner):
                delattr(owner, name)
    assert compiled.report.last_calls["artifact" if way == "kept" else "graph"] == 3 and not compiled.report.failure
