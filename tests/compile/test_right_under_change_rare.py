"""What a block can depend on in ways that are rare: the result is eager's there, too. See test_right_under_change."""
from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import fractions
import functools
import gc
import sys
import threading
import time
import types
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import changing_nets as nets
from int8_compile.compile.artifacts.source_guards import replaced_operators
from int8_compile.compile.block_calls import OwnCall
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions
from int8_compile.compile.torch_internals.unguarded import Unguarded
from test_right_under_change import COMPILED, cached, exported, inference, inputs, refused, run  # noqa: F401
from toys import difference

INDUCTOR = CompileOptions(mark_sizes=True, dynamic=False)
WAYS = pytest.mark.parametrize("way", ["kept", "compiled"])


def made(folder, way) -> CompiledModule:
    return cached(folder / "cache") if way == "kept" else CompiledModule(INDUCTOR if way == "inductor" else COMPILED)


def read(block, x, number):
    raise NotImplementedError  # a test puts its own here


class Reads(nets.Small):
    """Computes with what read gives; holds one of everything."""

    def __init__(self):
        super().__init__()
        self.helper, self.table, self.thing, self.value = Gain, {"kind": Gain}, Thing(), None
        self.order = collections.OrderedDict(a=1.0, b=2.0)
        self.config, self.space, self.ranked, self.matched = Config(), types.SimpleNamespace(level=1.0), Ranked(1.0), Matched()
        self.part, self.user, self.chain = fractions.Fraction(1, 2), collections.UserDict(k=1.0), collections.ChainMap({"k": 1.0})

    def forward(self, x, number=0.0, transformer_options=None):
        return self.body(x) * read(self, x, number)


class Closures(Reads):
    """What cannot be described to another process."""

    def __init__(self):
        super().__init__()
        self.function, self.functions, self.bound = enclosed(), [enclosed()], functools.partial(enclosed())


class Gain:
    gain = 1.0


class Thing:
    gain = 2.0

    def level(self):
        return 2.0


class Later(Thing):
    pass


def enclosed():
    factor = 2.0

    def inner(by=1.0):
        return by * factor
    return inner


@dataclasses.dataclass
class Config:
    level: float = 1.0


@dataclasses.dataclass(order=True)
class Ranked:
    level: float


class Matched:
    __match_args__ = ("level",)

    def __init__(self):
        self.level = 1.0


LAYER = torch.nn.LeakyReLU(0.25)
CONFIG, SPACE, RANKED = Config(), types.SimpleNamespace(level=1.0), Ranked(2.0)


@pytest.fixture
def reads(monkeypatch):
    return functools.partial(monkeypatch.setattr, sys.modules[__name__], "read")


DRAWS = {
    "rand": lambda block, x, number: torch.rand(x.shape),
    "randn_like": lambda block, x, number: torch.randn_like(x),
    "rand_like": lambda block, x, number: torch.rand_like(x, dtype=torch.float64).float(),
    "randint_like": lambda block, x, number: torch.randint_like(x, 9) + torch.randint_like(x, 3, 9) + torch.randint_like(x, high=2),
    "randint": lambda block, x, number: torch.randint(0, 9, x.shape),
    "bernoulli": lambda block, x, number: torch.bernoulli(x.sigmoid()),
    "exponential_": lambda block, x, number: torch.empty_like(x).exponential_(),
    "dropout": lambda block, x, number: F.dropout(x, 0.5, True),
    "attention with dropout": lambda block, x, number: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "some of each": lambda block, x, number: torch.rand(x.shape) - torch.randn(x.shape) * torch.rand(x.shape),
    "one that is not used": lambda block, x, number: (torch.rand(3), torch.rand(x.shape))[1],
}


@pytest.mark.rotating
@pytest.mark.parametrize("what", DRAWS)
def test_a_compiled_block_draws_eagers_random_numbers(tmp_path, reads, what):
    reads(DRAWS[what])
    net, compiled = nets.make(Reads, depth=2), made(tmp_path, "inductor")
    for seed, x in enumerate((dense(), dense(), loose(), dense())):  # numbers are drawn in the order of memory
        torch.manual_seed(seed)
        want, state = net(x), torch.get_rng_state()
        torch.manual_seed(seed)
        assert difference(run(compiled, net, x), want) < 1e-4
        assert torch.equal(torch.get_rng_state(), state)
    assert compiled.report.last_calls["graph"] == 2 and not compiled.report.failure


LAYOUTS = {
    "is_contiguous": lambda block, x, number: 2.0 if x.is_contiguous() else 3.0,
    "stride": lambda block, x, number: float(x.stride(-1)),
    "the stride of what is like it": lambda block, x, number: float(torch.empty_like(x).stride(-1)),
    "as_strided": lambda block, x, number: x.as_strided((2, 10, 32), (320, 32, 1)),
    "torch.as_strided": lambda block, x, number: torch.as_strided(x, (2, 10, 32), (320, 32, 1)),
    "storage_offset": lambda block, x, number: x.storage_offset() + 1.0,
    "what torch does not trace": torch.compiler.disable(lambda block, x, number: float(x.stride(-1))),
}


def dense():
    return inputs()[0]


def loose():
    return inputs()[0].transpose(1, 2).contiguous().transpose(1, 2)


def sliced():
    return torch.cat([inputs()[0]] * 2, 0)[2:]


@WAYS
@pytest.mark.parametrize("what", LAYOUTS)
@pytest.mark.parametrize("first", [dense, loose], ids=lambda make: make.__name__)
def test_a_block_that_asks_how_its_input_lies_in_memory_gets_eagers_answer(tmp_path, reads, what, first, way):
    reads(LAYOUTS[what])
    net, compiled = nets.make(Reads), made(tmp_path, way)
    block, said = net.blocks[0], []
    for make in (first, first, loose, sliced, dense, loose, dense):
        x = make()
        got = compiled.run(net, lambda x=x: block(x), filter_guards=True, passthrough=lambda error: False)
        assert difference(got, block(x)) < 1e-4, make.__name__
        said.append("the layout of its inputs, which it reads, is not as in the blocks" in compiled.report.text())
        assert not (said[-1] and way == "kept" and not compiled.report.last_calls["eager"])
    assert compiled.report.last_calls["artifact" if way == "kept" else "graph"] == 1 and not compiled.report.failure
    assert way == "compiled" or any(said)


GRADIENTS = {
    "requires_grad": lambda block, x, number: 2.0 if block.first.weight.requires_grad else 3.0,
    "is_leaf": lambda block, x, number: 2.0 if x.is_leaf and x.requires_grad else 3.0,
    "by getattr": lambda block, x, number: 2.0 if getattr(block.first.weight, "requires_grad") else 3.0,  # noqa: B009
}


@WAYS
@pytest.mark.parametrize("what", GRADIENTS)
def test_a_block_that_asks_whether_a_tensor_needs_a_gradient_runs_eager_and_says_so(tmp_path, reads, what, way):
    reads(GRADIENTS[what])
    with torch.inference_mode(False), torch.no_grad():
        net, compiled = nets.make(Reads), made(tmp_path, way)
        for value in (False, False, True, True, False):
            net.requires_grad_(value)
            x = torch.randn(2, 10, 32).requires_grad_(value)
            assert difference(run(compiled, net, x), net(x)) < 1e-4
        assert compiled.report.last_calls["eager"] == 3
        assert "asks whether a tensor needs a gradient" in (refused(compiled) if way == "kept" else compiled.report.text())


@WAYS
def test_a_class_that_is_met_later_counts_though_no_new_code_was_traced(tmp_path, reads, monkeypatch, way):
    reads(lambda block, x, number: block.thing.level())
    net, compiled, x = nets.make(Reads), made(tmp_path, way), inputs()[0]
    run(compiled, net, x)
    for block in net.blocks:
        block.thing = Later()
    for _ in range(2):
        assert difference(run(compiled, net, x), net(x)) < 1e-4
    monkeypatch.setattr(Later, "level", lambda self: 5.0, raising=False)
    assert difference(run(compiled, net, x), net(x)) < 1e-4


CHANGES = {
    "a class that it holds": (lambda block, x, number: block.helper.gain, lambda block, value: setattr(Gain, "gain", value)),
    "a class in a table": (lambda block, x, number: block.table["kind"].gain, lambda block, value: setattr(Gain, "gain", value)),
    "defaults of a closure": (lambda block, x, number: block.function(),
                              lambda block, value: setattr(block.function, "__defaults__", (value,))),
    "defaults of a closure in a list": (lambda block, x, number: block.functions[0](),
                                        lambda block, value: setattr(block.functions[0], "__defaults__", (value,))),
    "defaults of a closure in a partial": (lambda block, x, number: block.bound(),
                                           lambda block, value: setattr(block.bound.func, "__defaults__", (value,))),
    "the order of an OrderedDict": (lambda block, x, number: next(iter(block.order.values())),
                                    lambda block, value: block.order.move_to_end("a", value != 1.0)),
    "the order of an OrderedDict's items": (lambda block, x, number: sum(i * v for i, (k, v) in enumerate(block.order.items())),
                                            lambda block, value: block.order.move_to_end("a", value != 1.0)),
    "a dataclass that is compared": (lambda block, x, number: 2.0 if block.config == CONFIG else 3.0,
                                     lambda block, value: setattr(block.config, "level", value)),
    "a dataclass in a list": (lambda block, x, number: 2.0 if block.config in [CONFIG] else 3.0,
                              lambda block, value: setattr(block.config, "level", value)),
    "a dataclass that is ordered": (lambda block, x, number: 2.0 if block.ranked < RANKED else 3.0,
                                    lambda block, value: setattr(block.ranked, "level", value)),
    "a dataclass that is copied": (lambda block, x, number: 2.0 if dataclasses.replace(block.config) == CONFIG else 3.0,
                                   lambda block, value: setattr(block.config, "level", value)),
    "a dataclass of the module": (lambda block, x, number: 2.0 if block.config == CONFIG else 3.0,
                                  lambda block, value: setattr(CONFIG, "level", value)),
    "a SimpleNamespace": (lambda block, x, number: 2.0 if block.space == SPACE else 3.0,
                          lambda block, value: setattr(block.space, "level", value)),
    "a Fraction": (lambda block, x, number: float(block.part * 3),
                   lambda block, value: setattr(block, "part", fractions.Fraction(int(value), 2))),
    "a UserDict": (lambda block, x, number: block.user["k"], lambda block, value: block.user.update(k=value)),
    "a ChainMap": (lambda block, x, number: block.chain["k"], lambda block, value: block.chain.update(k=value)),
    "a layer of the module": (lambda block, x, number: LAYER(x) + 2.0, lambda block, value: setattr(LAYER, "negative_slope", value / 4)),
    "an object that is matched": (lambda block, x, number: matched(block.matched),
                                  lambda block, value: setattr(block.matched, "level", value)),
}


def matched(value):
    match value:
        case Matched(1.0):
            return 2.0
        case _:
            return 3.0


@WAYS
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_a_value_that_is_read_in_a_roundabout_way_shows_at_once(tmp_path, reads, what, way):
    function, change = CHANGES[what]
    reads(function)
    net, compiled, x = nets.make(Closures if "closure" in what else Reads), made(tmp_path, way), inputs()[0]
    try:
        for index, value in enumerate((1.0, 1.0, 3.0, 3.0, 1.0)):
            for block in net.blocks:
                change(block, value)
            assert difference(run(compiled, net, x), net(x)) < 1e-4, index
        used = "eager" if way == "kept" and "closure" in what else "artifact" if way == "kept" else "graph"
        assert compiled.report.last_calls[used] == 3 and not compiled.report.failure
    finally:
        for block in net.blocks:
            change(block, 1.0)


class Patched(nets.Small):
    def forward(self, x, transformer_options=None):
        h = self.body(x)
        for patch in transformer_options["patches"]["attn1_output_patch"]:
            h = patch(h)
        return h


def by_default(h, level=1.0):
    return h * level


def of_class(level):
    class Level:
        value = level
    return lambda h: h * Level.value


def of_classmethod(level):
    class Level:
        value = level

        @classmethod
        def times(cls, h):
            return h * cls.value
    return lambda h: Level.times(h)


def of_class_inside(level):
    inner = of_class(level)
    return lambda h: inner(h)


def of_method(level):
    class Level:
        value = level
    return types.MethodType(lambda self, h: h * Level.value, SPACE)


PATCHES = {
    "default of a copy": lambda level: types.FunctionType(by_default.__code__, globals(), "by_default", (level,)),
    "class": of_class, "class of two": lambda level: (lambda kind: lambda h: h * kind.gain)(Gain if level == 1.5 else Thing),
    "made class": lambda level: (lambda kind: lambda h: h * kind.value)(type("Level", (), {"value": level})),
    "class method": of_classmethod, "class of a function in it": of_class_inside, "class of a method": of_method,
    "closure": lambda level: lambda h: h * level,
}


class Levels:
    value = 1.5

    @property
    def times(self):
        return self.value


def of_changed_class(level):
    Levels.value = level
    kind = Levels
    return lambda h: h * kind.value


def of_nested(level):
    class Level:
        class Inner:
            value = level
    return lambda h: h * Level.Inner.value


class Holder(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind


class MadeOf(type):
    value = 1.5


def of_metaclass(level):
    MadeOf.value = level
    made = MadeOf("Level", (), {})
    return lambda h: h * made.value


def of_class_in(wrap, get):
    def of_class_in(level):
        held = wrap(type("Level", (), {"value": level}))
        return lambda h: h * get(held).value
    return of_class_in


def of_bound(level):
    class Level:
        def __init__(self):
            self.kind = type("Kind", (), {"value": level})

        def times(self, h):
            return h * self.kind.value
    return Level().times


def of_attribute(level):
    def patch(h):
        return h * patch.kind.value
    patch.kind = type("Kind", (), {"value": level})
    return patch


PATCHES.update({
    "class, then an object": lambda level: (lambda thing: lambda h: h * thing.value)(
        type("Level", (), {"value": level}) if level == 1.5 else types.SimpleNamespace(value=level)),
    "class of torch's": lambda level: (lambda kind: lambda h: kind()(h))(torch.nn.ReLU if level == 1.5 else torch.nn.Sigmoid),
    "class in a bound method": of_bound, "class of a function's attribute": of_attribute,
    "class in a partial": lambda level: functools.partial(lambda kind, h: h * kind.value, type("Kind", (), {"value": level})),
    "class that is changed": of_changed_class, "class in a class": of_nested, "metaclass": of_metaclass,
    "class in a list": of_class_in(lambda kind: [kind], lambda held: held[0]),
    "class in a dict": of_class_in(lambda kind: {"a": kind}, lambda held: held["a"]),
    "class in a module": of_class_in(Holder, lambda held: held.kind),
    "class far behind in a list": of_class_in(lambda kind: [*range(40), kind], lambda held: held[40]),
    "class deep in lists": of_class_in(lambda kind: [[[kind]]], lambda held: held[0][0][0]),
    "class in a layer": of_class_in(lambda kind: torch.nn.Sequential(Holder(kind)), lambda held: held[0].kind),
    "class that says it is torch's": of_class_in(lambda kind: setattr(kind, "__module__", "torch.nn") or [kind], lambda held: held[0]),
    "class in an object": of_class_in(lambda kind: types.SimpleNamespace(kind=kind), lambda held: held.kind),
})


def by_global(h):
    return h * LEVEL  # noqa: F821


class Attributed(dict):
    pass


class Slots:
    __slots__ = ("kind",)

    def __init__(self, kind):
        self.kind = kind


class Calls:
    def __init__(self, level):
        self.config = Attributed()
        self.config.level = level

    def __call__(self, h):
        return h * self.config.level


def of_attributes(level):
    config = Attributed()
    config.first, config.second, config.third, config.level = 1.0, 2.0, 3.0, level
    return lambda h: h * config.level


def of_config(level):
    config = Attributed()
    config.level = level
    return lambda h: h * config.level


def of_keyword_default(level):
    made = type("Level", (), {"value": level})

    def inner(h, *, kind=made):
        return h * kind.value
    return lambda h: inner(h)


def of_global_of_inner(level):
    inner = types.FunctionType(by_global.__code__, {"LEVEL": level, "__builtins__": __builtins__})
    return lambda h: inner(h)


def attribute_of_a_list(kind):
    class Items(list):
        pass
    items = Items()
    items.kind = kind
    return items


def of_many_globals(level):
    names = [f"A{index}" for index in range(200)]
    made = compile(f"lambda h: h * LEVEL if ({' + '.join(names)}) >= 0 else h", "made", "eval").co_consts[0]
    return types.FunctionType(made, {**dict.fromkeys(names, 1.0), "LEVEL": level, "__builtins__": __builtins__})


class ByKeys:
    def __init__(self, level):
        def inner(h, times=level):
            return h * times
        self.by = {("block", 0): {"attn": inner}, torch.float16: [inner]}

    def __call__(self, h):
        return self.by["block", 0]["attn"](h) + self.by[torch.float16][0](h)


PATCHES.update({
    "many globals": of_many_globals, "by tuples": ByKeys,
    "other globals": lambda level: types.FunctionType(by_global.__code__, {"LEVEL": level, "__builtins__": __builtins__}),
    "other globals of a function": of_global_of_inner,
    "last of a dict's attributes": of_attributes,
    "attribute of a dict": of_config, "attribute of a dict of an object that is called": Calls, "keyword default": of_keyword_default,
    "class in a slot": of_class_in(Slots, lambda held: held.kind),
    "class in a list's attribute": of_class_in(attribute_of_a_list, lambda held: held.kind),
    "class, then None": lambda level: (lambda kind: lambda h: h * (0.6 if kind is None else kind.value))(
        type("Level", (), {"value": level}) if level == 1.5 else None),
    "class in a list, then None": lambda level: (lambda kinds: lambda h: h * (0.6 if kinds[0] is None else kinds[0].value))(
        [type("Level", (), {"value": level}) if level == 1.5 else None]),
})


@pytest.mark.parametrize("kind", PATCHES)
def test_patches_of_the_same_code_with_another_default_or_class_are_others(kind):
    net, compiled, x = nets.make(Patched), CompiledModule(COMPILED), inputs()[0]
    for level in (1.5, 1.5, 0.6, 0.6, 1.5):
        options = {"patches": {"attn1_output_patch": [PATCHES[kind](level)]}}
        assert difference(run(compiled, net, x, **options), net(x, **options)) < 1e-4
    assert compiled.report.last_calls["graph"] == 3 and not compiled.report.failure


KINDS = {level: type("Level", (), {"value": level}) for level in (1.5, 0.6)}
MANY = [1.5] * 200


def of_many(level):
    MANY[150] = level

    def patch(h, levels=MANY):
        return h * levels[150]
    return patch


BEYOND = {
    "class behind many": lambda level: (lambda held: lambda h: h * held[80].value)([*range(80), KINDS[level]]),
    "class behind many objects": lambda level: (lambda objects, kind: lambda h: h * kind.value if objects else h)(
        [[types.SimpleNamespace(item=index) for index in range(60)] for _ in range(3)], KINDS[level]),
    "a long default that is changed": of_many,
}


@pytest.mark.parametrize("kind", BEYOND)
def test_what_is_too_far_away_to_be_described_is_not_taken_for_the_same(kind):
    net, compiled, x = nets.make(Patched), CompiledModule(COMPILED), inputs()[0]
    for level in (1.5, 1.5, 0.6, 0.6, 1.5):
        options = {"patches": {"attn1_output_patch": [BEYOND[kind](level)]}}
        assert difference(run(compiled, net, x, **options), net(x, **options)) < 1e-4, level
    assert not compiled.report.failure


def of_default(make):
    def of_default(level):
        made = make(level)

        def patch(h, held=made):
            return h * (held if isinstance(held, torch.Tensor) else held.level if hasattr(held, "level") else held())
        return patch
    return of_default


class Given:
    def __init__(self, level):
        self.level = level

    def get(self):
        return self.level


MADE_ANEW = {
    "tensor": torch.tensor, "parameter": lambda level: torch.nn.Parameter(torch.tensor(level), False), "object": Given,
    "method": lambda level: Given(level).get, "partial": lambda level: functools.partial(lambda level: level, level),
}


@pytest.mark.parametrize("make", MADE_ANEW.values(), ids=MADE_ANEW)
def test_a_default_that_is_made_anew_for_each_prompt_is_the_same_while_it_is_equal(make):
    net, compiled, x = nets.make(Patched), CompiledModule(COMPILED), inputs()[0]
    for level in (1.5, 1.5, 0.6, 0.6, 1.5):
        options = {"patches": {"attn1_output_patch": [of_default(make)(level)]}}
        assert difference(run(compiled, net, x, **options), net(x, **options)) < 1e-4, level
        assert level != 1.5 or compiled.report.last_calls["graph"] == 3
    assert not compiled.report.failure


@pytest.mark.parametrize("held", [lambda: [(1, index) for index in range(100)], lambda: {index: (1.0, index) for index in range(300)},
                                  lambda: [{"a": [index]} for index in range(60)], lambda: [[[[[[[1.0]]]]]]]],
                         ids=["tuples", "a dict of tuples", "dicts", "deep"])
def test_what_is_held_and_made_anew_for_each_prompt_is_the_same_while_it_is_equal(held):
    net, compiled, x = nets.make(Patched), CompiledModule(COMPILED), inputs()[0]
    for _ in range(3):
        options = {"patches": {"attn1_output_patch": [(lambda held: lambda h: h * 1.5 if held else h)(held())]}}
        assert difference(run(compiled, net, x, **options), net(x, **options)) < 1e-4
        assert compiled.report.last_calls["graph"] == 3 and not compiled.report.failure


def holds_itself():
    held = [1.5]
    held.append(held)
    return held


class NoIteration(list):
    def __iter__(self):
        raise RuntimeError("iter")


HELD = {"itself": holds_itself(), "iter": NoIteration([1.5]),
        "order": collections.OrderedDict({NoIteration: 1, 0: 1.5})}


@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_what_cannot_be_looked_into_compiles_as_torch_compiles_it(held):
    net, compiled, x = nets.make(Patched), CompiledModule(COMPILED), inputs()[0]
    for _ in range(2):
        options = {"patches": {"attn1_output_patch": [(lambda held: lambda h: h * 1.5 if held else h)(held)]}}
        assert difference(run(compiled, net, x, **options), net(x, **options)) < 1e-4
    assert compiled.report.last_calls["graph"] == 3 and not compiled.report.failure


class Odd:
    """Of what a patch may hold, the worst."""

    def __init__(self):
        self.again, self.many = self, {(index, "x"): [index] for index in range(5000)}

    def __repr__(self):
        raise RuntimeError("repr")

    __hash__ = None
    __eq__ = __repr__


class Nowhere:
    value = 1.5
    many = list(range(5000))


def test_what_cannot_be_described_raises_nothing_and_takes_no_time():
    Nowhere.__module__ = None

    def make(depth):
        inner, odd, made = make(depth - 1) if depth else None, Odd(), type("Raises", (), {"__class__": property(lambda self: 1 / 0)})()
        gone = weakref.proxy(type("Gone", (), {})())

        def patch(h, default=odd, more=(made, inner, Nowhere)):
            return h * 1.5 if gone is not None and inner is not patch and made is not odd else h * Nowhere.value
        return patch
    options = {"patches": {"attn1_output_patch": [make(6)]}}
    unguarded = Unguarded()
    unguarded.add("L['kwargs']['transformer_options']['patches']", options["patches"])
    unguarded.add("L['kwargs']['transformer_options']['patches']['attn1_output_patch']", options["patches"]["attn1_output_patch"])
    start = time.perf_counter()
    for _ in range(100):
        assert not unguarded.disagreement(None, (), {"transformer_options": options})
    assert time.perf_counter() - start < 1
    another = {"transformer_options": {"patches": {"attn1_output_patch": [make(6)]}}}
    assert unguarded.disagreement(None, (), another)


def test_what_is_too_deep_to_be_looked_into_raises_nothing():
    unguarded, deep = Unguarded(), functools.reduce(lambda inner, _: [inner], range(3000), 0.0)
    unguarded.add("L['args'][0]", deep)
    unguarded.add("L['args'][0]" + "[0]" * 3000, 0.0)
    assert not unguarded.disagreement(None, (deep,), {})


class Iterated(nets.Small):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(self.first, self.second)

    def forward(self, x, transformer_options=None):
        for layer in self.layers:
            x = layer(x)
        return x


def test_functions_that_an_iterated_layer_holds_and_does_not_call_are_not_asked_for():
    """As ComfyUI's weight_function, which has another LoRA at each prompt."""
    net, compiled, x = nets.make(Iterated), CompiledModule(COMPILED), inputs()[0]
    for level in (1.5, 0.6, 1.5):
        for block in net.blocks:
            block.first.holds = types.SimpleNamespace(functions=[PATCHES["default of a copy"](level), Given(level).get], kind=KINDS[level])
        assert difference(run(compiled, net, x), net(x)) < 1e-4
        assert compiled.report.last_calls["graph"] == 3


def test_another_patch_without_the_defaults_of_the_first_is_compiled():
    def first(h, level=1.5):
        return h * level

    def second(h):
        return h + 1

    def third(h, more=2):
        return h + more
    net, compiled, x = nets.make(Patched), CompiledModule(COMPILED), inputs()[0]
    for patch in (first, second, third, second, first):
        options = {"patches": {"attn1_output_patch": [patch]}}
        assert difference(run(compiled, net, x, **options), net(x, **options)) < 1e-4
        assert compiled.report.last_calls["graph"] == 3, compiled.report.text()


def test_a_longer_list_of_patches_is_compiled():
    net, compiled, x = nets.make(Patched), CompiledModule(COMPILED), inputs()[0]
    for levels in ((1.5,), (0.6, 2.0), (1.5, 1.5, 1.5), (0.6,)):
        options = {"patches": {"attn1_output_patch": [PATCHES["closure"](level) for level in levels]}}
        assert difference(run(compiled, net, x, **options), net(x, **options)) < 1e-4
        assert compiled.report.last_calls["graph"] == 3, compiled.report.text()


NUMBERS = {
    "a number": (lambda value: value, lambda number: number),
    "in a tuple": (lambda value: (1.0, value), lambda number: number[1]),
    "in lists": (lambda value: [1.0, [value]], lambda number: number[1][0]),
    "in a dict": (lambda value: {"a": value}, lambda number: number["a"]),
    "of a complex number": (lambda value: complex(value, 1.0), lambda number: number.real),
    "of an imaginary number": (lambda value: complex(1.0, value), lambda number: number.imag),
}


@pytest.mark.parametrize("place", ["argument", "attribute"])
@pytest.mark.parametrize("what", NUMBERS)
@pytest.mark.parametrize("values", [(0.0, -0.0, 0.0), (-0.0, 0.0, -0.0), (1.0, 2.0, 0.0, -0.0, 3.0), (1.0, 2.0, -0.0, 0.0, 3.0)], ids=str)
def test_a_zero_of_the_other_sign_is_another_number_wherever_it_is(tmp_path, reads, what, place, values):
    wrap, get = NUMBERS[what]

    def sign(number):
        return torch.copysign(torch.full((1,), 2.0), torch.full((1,), number)) + 5
    reads(lambda block, x, number: sign(get(number if place == "argument" else block.value)))
    net, compiled, x = nets.make(Reads), CompiledModule(COMPILED), inputs()[0]
    for value in values:
        for block in net.blocks:
            block.value = wrap(value)
        arguments = (wrap(value),) if place == "argument" else ()
        assert difference(run(compiled, net, x, *arguments), net(x, *arguments)) < 1e-4, value
    assert not compiled.report.failure


class Meta(type):
    pass


class Made(metaclass=Meta):
    def __init__(self, gain):
        self.gain = gain


class Fixed(type):
    def __call__(cls, gain):
        return type.__call__(cls, 7.0)


class MadeFixed(metaclass=Fixed):
    def __init__(self, gain):
        self.gain = gain


@pytest.mark.parametrize("what", ["set later", "there at first"])
@WAYS
def test_a_metaclass_may_make_the_objects_of_its_class_otherwise(tmp_path, reads, monkeypatch, what, way):
    reads((lambda block, x, number: Made(2.0).gain) if what == "set later" else (lambda block, x, number: MadeFixed(2.0).gain))
    net, compiled, x = nets.make(Reads), made(tmp_path, way), inputs()[0]
    for _ in range(2):
        assert difference(run(compiled, net, x), net(x)) < 1e-4
    monkeypatch.setattr(Meta, "__call__", lambda cls, gain: type.__call__(cls, 5.0), raising=False)
    for _ in range(2):
        assert difference(run(compiled, net, x), net(x)) < 1e-4
    assert way == "kept" or "which torch does not call" in compiled.report.text()


class Interface(abc.ABC):  # noqa: B024
    pass


@WAYS
def test_a_class_may_be_registered_as_another_ones(tmp_path, reads, way, monkeypatch):
    interface = abc.ABCMeta("Interface", (), {"__module__": __name__})
    monkeypatch.setattr(sys.modules[__name__], "Interface", interface)
    reads(lambda block, x, number: 2.0 if isinstance(block.thing, Interface) else 3.0)
    net, compiled, x = nets.make(Reads), made(tmp_path, way), inputs()[0]
    for step in range(4):
        if step == 2:
            interface.register(Thing)
        assert difference(run(compiled, net, x), net(x)) < 1e-4, step
        assert step >= 2 or way == "compiled" or compiled.report.calls["artifact"] == 3 * step
    interface.register(type("Unrelated", (), {}))
    assert difference(run(compiled, net, x), net(x)) < 1e-4


@pytest.mark.parametrize("way", ["kept", "inductor"])
@pytest.mark.parametrize("when", [0, 2])
def test_another_kernel_of_torchs_operator_is_run_and_named(tmp_path, reads, when, way):
    reads(lambda block, x, number: F.silu(x))
    net, compiled, x = nets.make(Reads), made(tmp_path, way), inputs()[0]
    with contextlib.ExitStack() as scope:
        for step in range(4):
            if step == when:
                library = torch.library.Library("aten", "IMPL")
                scope.callback(library._destroy)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    library.impl("silu", lambda x: x * 7, "CPU")
            assert difference(run(compiled, net, x), net(x)) < 1e-4, step
    for _ in range(2):
        assert difference(run(compiled, net, x), net(x)) < 1e-4
    assert way == "kept" or "aten/silu/CPU has been replaced" in compiled.report.text()


def test_a_kernel_that_torch_has_registered_itself_replaces_nothing():
    """As torch does for bmm and others on CUDA from 2.12 on, wherever Triton is installed."""
    known = replaced_operators()

    def register():
        library = torch.library.Library("aten", "IMPL", "CUDA")
        library.impl("mm", lambda a, b: a)
        return library
    for file, replaced in ((Path(torch.__file__).parent / "_native" / "registry.py", []), (Path(__file__), ["aten/mm/CUDA"])):
        library = types.FunctionType(register.__code__.replace(co_filename=str(file)), globals())()
        try:
            assert sorted(set(replaced_operators()) - set(known)) == replaced and not known
        finally:
            library._destroy()
            del library  # torch forgets its kernels when it goes


@pytest.mark.parametrize("last", ["first", "second"])
def test_two_models_that_share_blocks_leave_nothing_on_them(last):
    net, x = nets.make(nets.Plain), inputs()[0]
    compiled = [CompiledModule(COMPILED), CompiledModule(COMPILED)]
    for one in compiled:
        run(one, net, x)
    inside, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    results = []

    def step(index):
        def call():
            inside[index].set()
            assert leave[index].wait(60)
            return net(x)
        with torch.inference_mode():
            results.append(compiled[index].run(net, call, filter_guards=True, passthrough=lambda error: False))
    threads = [threading.Thread(target=step, args=(index,), daemon=True) for index in (0, 1)]
    for index, thread in enumerate(threads):
        thread.start()
        assert inside[index].wait(60)
    for index in (1, 0) if last == "first" else (0, 1):
        leave[index].set()
        threads[index].join(60)
    assert len(results) == 2 and all(difference(result, net(x)) < 1e-4 for result in results)
    assert not any(isinstance(block.__dict__.get("_compiled_call_impl"), OwnCall) for block in net.blocks)
    assert difference(run(compiled[0], net, x), net(x)) < 1e-4 and compiled[0].report.last_calls["graph"] == 3


def test_what_the_garbage_collector_calls_while_a_block_is_traced_is_not_the_blocks(tmp_path):
    def watch(phase, info):
        seen.append(time.perf_counter())
    seen, before = [], gc.get_threshold()
    net, compiled, x = nets.make(nets.Plain), cached(tmp_path / "cache"), inputs()[:1]
    gc.callbacks.append(watch)
    gc.set_threshold(200, 1, 1)
    try:
        for _ in range(2):
            assert difference(run(compiled, net, *x), net(*x)) < 1e-4
    finally:
        gc.callbacks.remove(watch)
        gc.set_threshold(*before)
    assert seen and compiled.report.last_calls["artifact"] and not compiled.report.fallbacks


DROPOUTS = {
    "between layers": lambda block, x, number: block.drop(x) * 2,
    "of channels": lambda block, x, number: F.dropout2d(x[None], 0.5, block.training)[0],
    "written into": lambda block, x, number: (lambda y: block.drop(y).mul_(2) + y)(x + 1),
    "of an input that is written into": lambda block, x, number: block.drop(x).mul_(2) + x,
    "alpha": lambda block, x, number: F.alpha_dropout(x, 0.5, block.training),
}


class Drops(Reads):
    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)


@pytest.mark.parametrize("what", DROPOUTS)
def test_dropout_that_is_off_is_kept_and_is_random_once_it_is_on(tmp_path, reads, what):
    reads(DROPOUTS[what])
    net, x = nets.make(Drops, depth=2).eval(), inputs()[0]
    for _ in range(2):
        compiled = cached(tmp_path / "cache")
        for tokens in (5, 6):
            given = [x[:, :tokens].clone() for _ in range(2)]
            assert difference(run(compiled, net, given[0]), net(given[1])) < 1e-5 and torch.equal(*given)
        assert compiled.report.last_calls["artifact"] == 2, compiled.report.fallbacks
    net.train()
    torch.manual_seed(1)
    want = net(x.clone())
    torch.manual_seed(1)
    assert torch.equal(run(compiled, net, x.clone()), want) and compiled.report.last_calls["artifact"] == 0
    net.eval()
    assert difference(run(compiled, net, x.clone()), net(x.clone())) < 1e-5 and compiled.report.last_calls["artifact"] == 2


def test_a_part_of_an_input_that_went_through_dropout_is_not_kept(tmp_path, reads):
    reads(lambda block, x, number: block.drop(x))
    net, compiled, x = nets.make(Part, depth=2).eval(), cached(tmp_path / "cache"), inputs()[0]
    assert torch.equal(run(compiled, net, x), net(x))
    assert compiled.report.calls["artifact"] == 0 and "it returns a part of its input" in refused(compiled)


class Part(Drops):
    def forward(self, x, transformer_options=None):
        return self.drop(x[:, 1:])


class Helped(nets.Small):
    def forward(self, x, transformer_options=None):
        return self.help(self.body(x))

    def help(self, x):
        return x


class Helper:
    def help(self, x):
        return x * 3


HELPER = Helper()


def half(self, x, transformer_options=None):
    return self.body(x) / 2


def double(self, x):
    return x * 2


METHODS = {
    "forward": lambda block: ("forward", types.MethodType(half, block)),
    "forward, by get": lambda block: ("forward", half.__get__(block, type(block))),
    "another method": lambda block: ("help", types.MethodType(double, block)),
    "an object's": lambda block: ("help", HELPER.help),
}


@WAYS
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize("what", METHODS)
def test_a_bound_method_that_is_put_on_a_block_is_run_there_and_only_while_it_is_there(tmp_path, what, which, way):
    net, compiled, x = nets.make(Helped, depth=3), made(tmp_path, way), inputs()[0]
    for _ in range(2):
        for put in (False, True, True, False):
            for index in which:
                block = net.blocks[index]
                name, method = METHODS[what](block)
                block.__dict__.pop(name, None)
                if put:
                    setattr(block, name, method)
            assert difference(run(compiled, net, x), net(x)) < 1e-4, put
    assert not compiled.report.failure and compiled.report.graphs <= 4


def test_a_layer_without_weights_that_code_names_is_described_and_one_with_weights_is_not(tmp_path, reads, monkeypatch):
    reads(lambda block, x, number: LAYER(x) + 2.0)
    net, x = nets.make(Reads, depth=2), inputs()[0]
    for _ in range(2):
        assert difference(run(compiled := cached(tmp_path / "cache"), net, x), net(x)) < 1e-4
    assert compiled.report.last_calls["artifact"] == 2
    handle = LAYER.register_forward_hook(lambda layer, args, result: result * 2)
    assert difference(run(compiled, net, x), net(x)) < 1e-4
    handle.remove()
    assert difference(run(compiled, net, x), net(x)) < 1e-4
    monkeypatch.setattr(sys.modules[__name__], "LAYER", torch.nn.PReLU())
    compiled = cached(tmp_path / "other")
    assert difference(run(compiled, net, x), net(x)) < 1e-4
    assert compiled.report.calls["artifact"] == 0 and "tensors that are neither parameters nor buffers" in refused(compiled)
