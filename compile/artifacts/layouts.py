"""Whether a block does something else for another layout of its inputs: contiguous() and reshape() give the tensor itself for one and a
copy for another, and what is written into that, or returned, is then the caller's tensor or is not; random numbers are drawn in the order
of memory."""
from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

MAX_DIMS = 4  # all orders of so many dims are tried, of more dims two neighbours that change places


def depends_on_layout(call: Callable, inputs: list, device: str | None = None, writes: bool = False) -> bool:
    """Whether call(*inputs) writes into other inputs, returns parts of others, or draws random numbers in another order, where an input has
    another layout than a dense one; also where that cannot be found out. writes: or where it writes into one at all: a copy of that would
    hide it from who holds the memory under a name that no input has. inputs: tensors, of which parameters stay as they are, and numbers.
    device: instead of theirs. Nothing is computed: a run without data takes some ms."""
    base = _run(call, inputs, device, {})
    if base is None or base.returns_part or (writes and any(base.written)):
        return True
    if isinstance(call, torch.fx.GraphModule) and not base.writes and not base.drawn and not _may_return_copy(call):
        return False
    orders = {dims: _orders(dims) for dims in {value.dim() for value in inputs if _is_activation(value)}}
    # At once for all inputs: the orders of each number of dims in turn.
    layouts = itertools.zip_longest(*[[(dims, order) for order in found] for dims, found in orders.items()])
    return any(_run(call, inputs, device, dict(filter(None, layout))) != base for layout in layouts)


class _Effects:
    """writes: whether any tensor is written into. written: inputs that are. returned: of each output the input whose memory it is.
    returns_part: whether one is part of an input, or another view of it. drawn: the strides of what is random."""

    def __init__(self, writes: bool, written: list[bool], returned: list[int], returns_part: bool, drawn: list[tuple]):
        self.writes, self.written, self.returned, self.returns_part, self.drawn = writes, written, returned, returns_part, drawn

    def __eq__(self, other):
        return other is not None and ((self.written, self.returned, self.returns_part, self.drawn)
                                      == (other.written, other.returned, other.returns_part, other.drawn))

    __hash__ = None


class _Writes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes whether an operator writes into what it gets, and the strides of what one draws."""

    def __init__(self):
        super().__init__()
        self.found, self.drawn = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= func._schema.is_mutable
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn += [value.stride() for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, Tensor)]
        return result


def _is_activation(value) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)


def _orders(dims: int) -> list[tuple[int, ...]]:
    """Of dims in memory, the outermost first; () stands for every second element of a larger tensor."""
    if dims <= MAX_DIMS:
        return [(), *itertools.permutations(range(dims))]
    return [(), *[(*range(dim), dim + 1, dim, *range(dim + 2, dims)) for dim in range(dims - 1)]]


def _number(value):
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def _run(call: Callable, inputs: list, device: str | None, orders: dict[int, tuple[int, ...]]) -> _Effects | None:
    """The call without data, with those activations that have so many dims in that order (see _orders). None where it cannot be run so."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def make(value):
        if not isinstance(value, Tensor):
            return _number(value)
        shape, strides = [list(map(_number, numbers)) for numbers in (value.shape, value.stride())]
        order = orders.get(len(shape)) if _is_activation(value) else None
        if order == ():
            strides = [stride * 2 for stride in strides]
        elif order is not None:
            step = 1
            for dim in reversed(order):
                strides[dim], step = step, step * max(shape[dim], 2)  # a dim of 1 would hide the order
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=device or value.device)
    try:
        with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _Writes() as writes:
            values = list(map(make, inputs))
            writes.found, writes.drawn = False, []
            tensors = [(index, value) for index, value in enumerate(values) if isinstance(value, Tensor)]
            before = [value._version for _, value in tensors]
            outputs = [value for value in torch.utils._pytree.tree_leaves(call(*values)) if isinstance(value, Tensor)]
            memory = {value.untyped_storage()._cdata: index for index, value in tensors}
            returned = [memory.get(value.untyped_storage()._cdata, -1) for value in outputs]
            return _Effects(writes.found, [value._version != version for (_, value), version in zip(tensors, before)], returned,
                            any(index >= 0 and value is not values[index] for value, index in zip(outputs, returned)), writes.drawn)
    except Exception:
        return None


_VIEWS = frozenset({"transpose", "permute", "swapaxes", "movedim", "view", "unsqueeze", "squeeze", "getitem", "chunk", "split", "unbind",
                    "narrow", "select", "expand", "unflatten", "t", "T", "mT", "getattr", "detach", "to", "dropout", "float", "type_as"})
_COPIES = frozenset({"contiguous", "reshape", "flatten", "ravel", "reshape_as", "rearrange"})


def _may_return_copy(graph: torch.fx.GraphModule) -> bool:
    """Whether an output is an input in another layout."""
    for node in graph.graph.output_node().all_input_nodes:
        seen_copy = False
        while node.op in ("call_function", "call_method") and node.args and isinstance(node.args[0], torch.fx.Node):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            if name not in _VIEWS | _COPIES:
                break
            seen_copy |= name in _COPIES
            node = node.args[0]
        if node.op == "placeholder" and seen_copy:
            return True
    return False
