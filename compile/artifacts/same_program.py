"""Whether two traces of a block are one program: that for any batch, and that for batch 1."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .inputs import _expression, _is_size, _Traced
from .job import BuildSpec


def same_program(many: _Traced, one: _Traced, job: BuildSpec) -> bool:
    """Whether the program for any batch computes at batch 1 what the one for batch 1 does: the same operations with the same constants,
    slice bounds and sizes."""
    return _operations(many, job) == _operations(one, job)


def _memory(value) -> set[int]:
    """Of the tensors in it."""
    return {tensor.untyped_storage()._cdata for tensor in tree_leaves(value) if isinstance(tensor, Tensor)}


def _filled(nodes: list[torch.fx.Node]) -> set[int]:
    """The memory that operations write into."""
    found: set[int] = set()
    for node in nodes:
        for argument, value in zip(getattr(getattr(node.target, "_schema", None), "arguments", ()), node.args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found |= _memory([other.meta.get("val") for other in tree_leaves(value) if isinstance(other, torch.fx.Node)])
    return found


def _operations(traced: _Traced, job: BuildSpec) -> list[tuple]:
    """What the program does at batch 1, each tensor by the number of the operation that makes it. Sizes are written in terms of the inputs'
    sizes; what only works them out or takes all of a tensor, which a known size leaves out, is not listed."""
    import sympy

    nodes = list(traced.program.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"][len(job.tensors):]
    sizes: dict = {}  # symbol -> what it is at batch 1
    for index, node in enumerate(inputs):
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(expression := _expression(size), sympy.Symbol):
                batch = dim == 0 and index in job.batch_leaves
                sizes.setdefault(expression, sympy.Integer(1) if batch else sympy.Symbol(f"leaf{index}_{dim}", integer=True, positive=True))
    made: dict = {}
    result = []
    filled = _filled(nodes)

    def text(value):
        if isinstance(value, torch.fx.Node):
            return made[value]
        if isinstance(value, (list, tuple)):
            return [text(item) for item in (["int", value[1]] if _is_size(value) else value)]
        if isinstance(value, slice):
            return "slice", text(value.start), text(value.stop), text(value.step)
        if isinstance(value, (torch.SymInt, torch.SymBool)):
            return f"size {value.node.expr.xreplace(sizes)}"
        return f"size {value}" if type(value) is int else f"{type(value).__name__} {value!r}"

    def shape(node):
        value = node.meta.get("val")
        values = value if isinstance(value, (list, tuple)) else [value]
        return [text(list(item.shape)) if isinstance(item, Tensor) else None for item in values]

    def memory(node):
        """Which of its inputs share memory with its results, where that is written into: a reshape is a view or a copy, by its strides."""
        results, found = _memory(node.meta.get("val")), [_memory(other.meta.get("val")) for other in node.all_input_nodes]
        return [bool(results & other) for other in found] if filled & results.union(*found) else None
    for node in nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, (torch.SymInt, torch.SymBool, int)) and not isinstance(value, bool):
            made[node] = text(value)
        elif node.op == "call_function" and value is None and ("assert" in str(node.target) or "constrain" in str(node.target)):
            continue
        elif str(node.target) == "aten.slice.Tensor" and shape(node) == shape(node.args[0]):
            made[node] = made[node.args[0]]
        else:
            result.append((node.op if node.op != "call_function" else str(node.target), text(node.args),
                           sorted((key, text(item)) for key, item in node.kwargs.items()), shape(node), memory(node)))
            made[node] = f"#{len(result)}"
    written = [{key: text(value) for key, value in options.writes().items()} for options in traced.seen.options]
    return [*result, ("options", written), ("outputs", text(traced.seen.outputs))]
