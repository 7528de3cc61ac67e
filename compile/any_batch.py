"""A block that is called with a batch of 1 first is compiled for any batch. Torch makes no size of a 1 that it traces: it is given a call
of more, which it compiles and never runs; the graph serves 1 too, where torch's guards let it in."""
from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .artifacts import records
from .artifacts.job import dynamic_dims_of_rank, is_table_of_positions

BATCH = 2


class NotRun(RuntimeError):
    """What a graph gives that is compiled and not run."""


class NotForOne(RuntimeError):
    """A graph for a larger batch is none for a batch of 1."""


def is_batch_of_one(tensors: Iterable[Tensor]) -> bool:
    """tensors: of a call."""
    first = next((tensor for tensor in tensors if tensor.dim() > 1), None)
    return first is not None and first.shape[0] == 1


def with_more(value, made: dict):
    """value, an argument of a block, with a batch of BATCH in the place of 1, and nothing in it. made: {id: the same of what it holds}."""
    if id(value) in made:
        return made[id(value)]
    result = value
    if type(value) is Tensor:
        if value.shape[:1] == (1,) and 0 in dynamic_dims_of_rank(value.dim()) and not is_table_of_positions(value.shape):
            with torch.inference_mode(value.is_inference()):
                result = _empty(value)
    elif type(value) in (tuple, list):
        result = type(value)(with_more(item, made) for item in value)
    elif records.is_record(value):
        state = {key: with_more(item, made) for key, item in records.state(value).items()}
        result = records.filled(object.__new__(type(value)), state)
    made[id(value)] = result
    return result


def _empty(value: Tensor) -> Tensor:
    """[BATCH, ...] in the layout of value [1, ...]."""
    shape, (of_batch, *strides) = (BATCH, *value.shape[1:]), value.stride()
    if of_batch > sum((size - 1) * stride for size, stride in zip(shape[1:], strides)):
        return torch.empty_strided(shape, value.stride(), dtype=value.dtype, device=value.device)
    return torch.empty(shape, dtype=value.dtype, device=value.device)


def require_one(environment) -> None:
    """environment: what torch has found out of sizes (ShapeEnv) in a trace of BATCH. Raises NotForOne where its guards keep a batch of 1
    out."""
    import sympy  # compile machinery: at the first compile, not at import

    values = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    batches = {symbol for symbol, sources in environment.var_to_sources.items()
               if values.get(symbol) == BATCH and any(name_of(source).endswith(".size()[0]") for source in sources)}
    values = {**values, **dict.fromkeys(batches, 1)}
    if any(guard.expr.xreplace(values) == sympy.false for guard in environment.guards):
        raise NotForOne
    for symbol in batches:
        replacement = environment.replacements.get(symbol)
        if environment.var_to_range[symbol].lower > 1 if replacement is None else replacement.is_number:
            raise NotForOne


def name_of(source) -> str:
    return source.name() if callable(source.name) else source.name  # a method in older torch


@dataclass
class Writes:
    """by_batch: something is written into what is a view of another tensor for a batch of 1 and a copy for more, or the other way round.
    into_inputs: of the block."""
    by_batch: bool
    into_inputs: list[torch.fx.Node]

    def into(self, shared: Container[int]) -> bool:
        """Whether into one of the inputs with these ids, or one that dynamo does not tell."""
        examples = [getattr(node.meta.get("grapharg"), "example", None) for node in self.into_inputs]
        return any(example is None or id(example) in shared for example in examples)

    @classmethod
    def of(cls, graph: torch.fx.Graph) -> Writes:
        family: dict[torch.fx.Node, torch.fx.Node] = {}  # node -> the first of those that its memory is, or may be for another batch
        copied, written = set(), set()
        for node in graph.nodes:
            name = str(getattr(node.target, "__name__", node.target))
            source = next(iter(node.all_input_nodes), None)
            shares = next((given for given in node.all_input_nodes if _memory(given) & _memory(node)), None)
            family[node] = node if shares is None else family[shares]
            if shares is None and source is not None and _may_be_view(node, name, source):
                family[node] = family[source]
                copied.add(family[node])
            in_place = shares is not None and getattr(node.target, "__module__", None) == "torch.nn.functional"
            if source is not None and (name == "setitem" or _WRITES.fullmatch(name) or in_place):
                written.add(family[source])
            if isinstance(out := node.kwargs.get("out"), torch.fx.Node):
                written.add(family[out])
        return cls(not copied.isdisjoint(written), [node for node in written if node.op == "placeholder"])


def _memory(node: torch.fx.Node) -> set[int]:
    """Of its tensors in the trace."""
    value, found = node.meta.get("example_value"), set()
    for tensor in value if isinstance(value, (tuple, list)) else (value,):
        with contextlib.suppress(RuntimeError):  # of a class that is made of others
            found |= {tensor.untyped_storage()._cdata} if isinstance(tensor, Tensor) else set()
    return found


def _may_be_view(node: torch.fx.Node, name: str, source: torch.fx.Node) -> bool:
    """Whether a node that shares no memory with source may do so for another batch."""
    of, to = source.meta.get("example_value"), node.meta.get("example_value")
    if isinstance(of, Tensor) and isinstance(to, Tensor) and of.dtype != to.dtype:
        return False
    is_torchs = node.op == "call_method" or (getattr(node.target, "__module__", None) or "torch").split(".")[0] in _TORCHS
    return node.op in ("call_function", "call_method") and (name in _COPIES or not is_torchs)


# Torch's functions that give a view where they can and a copy where not; who else's (einops') may be such.
_COPIES = frozenset({
    "reshape", "contiguous", "flatten", "ravel", "reshape_as", "unflatten", "to", "einsum", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "native_channel_shuffle"})
_TORCHS = ("torch", "builtins", "math", operator.add.__module__)
# mul_, iadd; not __getitem__.
_WRITES = re.compile(r"[a-z0-9_]*[a-z0-9]_|i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift|matmul)")


class Unrun:
    """A graph that is not run while its backend compiles for more."""

    def __init__(self, graph: Callable, backend):
        self._graph, self._backend = graph, backend

    def __call__(self, *args):
        if self._backend.compiles_for_more:
            raise NotRun
        return self._graph(*args)
