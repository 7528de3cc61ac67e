"""A block that reads everything a block can depend on, for tests that change one thing after it was compiled."""
from __future__ import annotations

import enum
import functools
import importlib
import operator
import os
import random
import time
import uuid
from collections import namedtuple
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType, SimpleNamespace

import torch
import torch.nn.functional as F

TABLE = {"gain": 1.0, "mode": "plain"}
LEVELS = [1.0, 2.0]
SETTINGS = SimpleNamespace(gain=1.0, nested=SimpleNamespace(depth=[1.0, (2.0, 3.0)]))
NAMED = SimpleNamespace(changing_values=2.0)
ACTIVATIONS = {"silu": lambda x: F.silu(x), "relu": lambda x: F.relu(x)}
FACTOR = 1.0


class Kind(enum.Enum):
    PLAIN = 1.0
    DOUBLE = 2.0


KIND = Kind.PLAIN


@dataclass
class Config:
    gain: float = 1.0
    inner: list = field(default_factory=lambda: [1.0, {"deep": 1.0}])


def scaled(x, by=1.0):
    return x * by


def shifted(x):
    return x + 1


class Rope:
    strength = 1.0

    @staticmethod
    def apply(x):
        return x * Rope.strength


def wrapped(function):
    @functools.wraps(function)
    def outer(*args, **kwargs):
        return function(*args, **kwargs) * 3
    return outer


class Base(torch.nn.Module):
    def finish(self, x):
        return x * 1.0


class Layer(torch.nn.Linear):
    """As comfy.ops has its own."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Block(Base):
    slope = 1.0

    def __init__(self, width: int = 32):
        super().__init__()
        self.first = Layer(width, 2 * width)
        self.second = torch.nn.Linear(2 * width, width)
        self.norm = torch.nn.LayerNorm(width)
        self.drop = torch.nn.Identity()
        self.config = Config()
        self.kind = Kind.PLAIN
        self.gain = 1.0
        self.functions = [scaled]
        self.pairs = ((1.0, 2.0), (3.0, (4.0,)))
        self.chosen = {1, 2}
        self.part = slice(0, 16)
        self.scale_0 = 1.0

    def forward(self, x, scale, transformer_options=None):
        h = self.first(self.norm(x))
        h = ACTIVATIONS["silu"](h)
        h = self.drop(self.second(h)) * scale[:, None]
        h = h * self.config.gain * self.config.inner[0] * self.config.inner[1]["deep"] * self.kind.value * self.gain
        for function in self.functions:
            h = function(h)
        h = h * self.pairs[0][1] * self.pairs[1][1][0] * len(self.chosen) * sum(self.chosen)
        h = torch.cat([h[..., self.part] * 2, h[..., 16:]], -1) if self.part.stop == 16 else h[..., self.part].repeat(1, 1, 2) * 3
        h = h * getattr(self, f"scale_{0}") * Block.slope * self.slope * TABLE["gain"] * LEVELS[0] * SETTINGS.gain * FACTOR
        h = h * SETTINGS.nested.depth[1][0] * KIND.value
        h = Rope.apply(h) + F.silu(scaled(h)).tanh()
        return x + self.finish(h)


class Slotted:
    __slots__ = ("gain", "inner")

    def __init__(self, inner=None):
        self.gain, self.inner = 1.0, inner


class Level(float):
    def __init__(self, value):
        self.extra = 1.0


class Label(str):
    pass


class Shade(enum.Enum):
    LIGHT = 1.0

    def __init__(self, strength):
        self.strength = strength


class Meta(type):
    factor = 1.0

    @property
    def level(cls):
        return 1.0


class Measured(metaclass=Meta):
    pass


class First:
    def gain(self):
        return 1.0


class Second:
    def gain(self):
        return 2.0


class Helper(First):
    pass


class Other(torch.nn.Module):
    """Stands where Base stands."""

    def finish(self, x):
        return x * 3


SLOTTED = Slotted(Slotted())
INNER = {"gain": 1.0}
VIEW = MappingProxyType(INNER)
SCALED = functools.partial(scaled, by=1.0)
SHIFT = TIMES = LAYERS = 1.0
FILE = ""
PACKED = True
Pair = namedtuple("Pair", "first second")


def timed(function):
    @functools.wraps(function)
    def outer(x):
        return function(x) * TIMES
    return outer


@timed
def decorated(x):
    return x * SHIFT


def enclosing(factors):
    return lambda x: x * factors[0] * LAYERS


CLOSED = enclosing([1.0])


def marked(x):
    return x * marked.amount


marked.amount = 1.0


class Reads(Base):
    """Reads values, and calls functions, in ways that are easy to overlook."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.first, self.second = Layer(width, width), torch.nn.Linear(width, width)
        self.norm, self.leaky, self.gelu = torch.nn.LayerNorm(width), torch.nn.LeakyReLU(0.1), torch.nn.GELU()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.slotted = Slotted()
        self.nested = SimpleNamespace(depth=SimpleNamespace(gain=1.0))
        self.helper = Helper()

    def forward(self, x, scale, transformer_options=None):
        import changing_values
        import changing_values as values
        from changing_values import EXPONENT

        h = self.norm(x + 0.1)
        h = self.second(self.leaky(self.gelu(self.first(h))))
        h = self.conv(h[:, None])[:, 0] * scale[:, None]
        h = h * self.slotted.gain * SLOTTED.inner.gain * INNER["gain"] * VIEW["gain"]
        h = h * operator.attrgetter("nested.depth.gain")(self) * Shade.LIGHT.strength * Measured.factor
        h = CLOSED(decorated(SCALED(marked(h)))) * self.helper.gain()
        return x + self.finish(h * changing_values.FACTOR * values.FACTOR * EXPONENT)


class Breaks(Reads):
    """What dynamo makes several graphs of."""

    def __init__(self):
        super().__init__()
        self.level, self.label = Level(1.0), Label("gain")

    def forward(self, x, scale, transformer_options=None):
        h = self.second(self.norm(x)) * float(self.level) * self.level.extra * len(self.label) * Measured.level
        return x + h * scale[:, None]


class LikeAModule(Reads):
    """Reads an attribute that is called like a module."""

    def forward(self, x, scale, transformer_options=None):
        return x + self.second(self.norm(x)) * scale[:, None] * NAMED.changing_values * TABLE["gain"]


class ByText(Reads):
    """Gets at globals by texts."""

    def forward(self, x, scale, transformer_options=None):
        factor = globals()["INNER"]["gain"] * importlib.import_module("changing_values").FACTOR
        return x + self.second(self.norm(x)) * scale[:, None] * factor


class Net(torch.nn.Module):
    def __init__(self, kind=Block, depth: int = 3, **arguments):
        super().__init__()
        self.blocks = torch.nn.ModuleList([kind(**arguments) for _ in range(depth)])

    def forward(self, x, *args, shared=None, bare=False, **options):
        """shared: the same dict for all blocks; bare: none but options."""
        for index, block in enumerate(self.blocks):
            given = options if bare else {"block_index": index, "sigmas": x.new_ones(1), **options}
            x = block(x, *args, transformer_options=given if shared is None else shared)
        return x


class Small(torch.nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.first, self.second = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def body(self, x):
        return self.second(F.gelu(self.first(x)))


class Appends(Small):
    """The calling convention of Wan's VAE: a cache list and an index that the blocks advance."""

    def forward(self, x, cache, index, transformer_options=None):
        h = self.body(x)
        if cache[index[0]] is not None:
            h = h + cache[index[0]]
        cache[index[0]] = h
        index[0] += 1
        return h


class Collects(Small):
    def forward(self, x, found, transformer_options=None):
        found.append(self.body(x))
        return found[-1]


class Flags(Small):
    """Sets a flag that the next block reads."""

    def forward(self, x, transformer_options):
        h = self.body(x) * (2 if transformer_options.get("seen") else 1)
        transformer_options["seen"] = True
        return h


class Counts(Small):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, transformer_options=None):
        self.calls += 1
        return self.body(x) * self.calls


class Remembers(Small):
    """Keeps a dict on a layer, as LTXV's causal convolutions do."""

    def __init__(self):
        super().__init__()
        self.state = {}

    def forward(self, x, transformer_options=None):
        h = self.body(x) + self.state.get("last", 0)
        self.state["last"] = 1
        return h


class InPlace(Small):
    def forward(self, x, context, transformer_options=None):
        x += self.body(x)
        return x + context


class Random(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * random.random()


class Clock(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (time.time() % 10)


class Environment(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * float(os.environ.get("INT8_COMPILE_TEST_GAIN", "1"))


class InEnvironment(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (2.0 if "INT8_COMPILE_TEST_GAIN" in os.environ else 1.0)


class Getenv(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * float(os.getenv("INT8_COMPILE_TEST_GAIN", "1"))


class Now(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * datetime.now().microsecond


class Unique(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (uuid.uuid4().int % 1009)


class Opens(Small):
    def forward(self, x, transformer_options=None):
        with open(FILE) as file:
            return self.body(x) * float(file.read())


class Stats(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * os.path.getsize(FILE)


class Identity(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (id(self) % 1009)


class Process(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (os.getpid() % 1009)


class ByBatch(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (2.0 if x.shape[0] == 1 else 3.0)


class SliceByBatch(Small):
    def forward(self, x, transformer_options=None):
        h = self.body(x)
        return (h[..., :16] if x.shape[0] == 1 else h[..., 16:]).repeat(1, 1, 2)


class Truth(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * 2 if transformer_options else x


class Length(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (1 + len(transformer_options or ()))


class Differs(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (2 if transformer_options != {} else 1)


class Prints(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * len(str(transformer_options))


class Pops(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (2 if transformer_options.pop("a", None) else 1)


class Deletes(Small):
    def forward(self, x, transformer_options=None):
        h = self.body(x) * (2 if "a" in transformer_options else 1)
        if "a" in transformer_options:
            del transformer_options["a"]
        return h


class Hands(Small):
    """Hands a tensor on to the next block."""

    def forward(self, x, transformer_options=None):
        h = self.body(x) + transformer_options.get("handed", 0)
        transformer_options["handed"] = h
        return h


class Sigmas(Small):
    def forward(self, x, transformer_options=None):
        sigmas = transformer_options.get("sigmas")
        return self.body(x) if sigmas is None else self.body(x) * sigmas


class Index(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (transformer_options["block_index"] + 1)


class Conds(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * (2 if 1 in transformer_options.get("cond_or_uncond", ()) else 1)


class Numbers(Small):
    def forward(self, x, number, transformer_options=None):
        return self.body(x) * number


class Sized(Small):
    def forward(self, x, size, transformer_options=None):
        return self.body(x) * {torch.Size: 2.0, tuple: 3.0, list: 4.0}[type(size)] * size[-1]


class Named(Small):
    def forward(self, x, pair, transformer_options=None):
        return self.body(x) * (pair.second if hasattr(pair, "second") else pair[0])


class Keywords(Small):
    def forward(self, x, transformer_options=None, **gains):
        return self.body(x) * (gains["low"] if next(iter(gains), "") == "high" else 5.0)


class Same(Small):
    def forward(self, x, first, second, transformer_options=None):
        return self.body(x) + first * (2.0 if first is second else 3.0) + second


class Called(Small):
    def forward(self, x, function, transformer_options=None):
        return function(self.body(x))


class Unpacked(torch.nn.Linear):
    def artifact_tensors(self):
        return dict(self._parameters)

    def artifact_constants(self):
        return ()


class Packed(Unpacked):
    """As a layer of this pack: gives its tensors by a mapping, none while it computes otherwise."""

    def artifact_tensors(self):
        return super().artifact_tensors() if PACKED else {}

    def artifact_replacement(self):
        return Unpacked, (self.in_features, self.out_features)

    def forward(self, x):
        return super().forward(x) if PACKED else x * 2


class Packs(Small):
    def __init__(self):
        super().__init__()
        self.second = Packed(32, 32)

    def forward(self, x, transformer_options=None):
        return self.body(x)


class Scalar(Small):
    """Reads what nobody can describe."""

    def __init__(self):
        super().__init__()
        self.source = iter([2.0, 3.0, 4.0])

    def forward(self, x, transformer_options=None):
        return self.body(x) * (2 if self.source is not None else 1)


class View(Small):
    def forward(self, x, transformer_options=None):
        self.body(x)
        return x[:, :4]


class Tied(Small):
    def __init__(self):
        super().__init__()
        self.second.weight = self.first.weight

    def forward(self, x, transformer_options=None):
        return self.body(x)


class Optional(Small):
    def __init__(self):
        super().__init__()
        self.register_buffer("extra", None)

    def forward(self, x, transformer_options=None):
        return self.body(x) if getattr(self, "extra", None) is None else self.body(x) * self.extra


class Fails(Small):
    def __init__(self):
        super().__init__()
        self.fails = None

    def forward(self, x, transformer_options=None):
        if self.fails is not None:
            self.fails()
        return self.body(x)


class Plain(Small):
    def forward(self, x, transformer_options=None):
        return self.body(x)


def make(kind=Block, depth: int = 3, **arguments) -> Net:
    torch.manual_seed(0)
    return Net(kind, depth, **arguments).eval().requires_grad_(False)
