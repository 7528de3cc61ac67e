"""Fusions that the compiler cannot make around operations that it does not look into: a norm and a modulation, or a GELU, go into the
quantizer behind them, a gate and a residual into the product before them."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .kernels import ops

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default)
# Of rows, of what is done to them and of what is added: not fp64, which would be rounded, nor fp8, which a cast to it rounds for good.
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
CAST = torch.ops.prims.convert_element_type.default


def fuse(graph: Graph) -> tuple[int, int, int]:
    """How many quantizers now have a norm, how many a GELU, and to how many products something is added."""
    split = _split_addcmul(graph)
    found = _fuse_norms(graph), _fuse_activations(graph), _fuse_residuals(graph)
    if any(found):
        graph.eliminate_dead_code()
    for product, total in split:
        if total.users:  # it is in nothing: as torch had it, which rounds once on some devices
            with graph.inserting_before(total):
                whole = graph.call_function(aten.addcmul.default, (total.args[0], *product.args))
            whole.meta.update(total.meta)
            total.replace_all_uses_with(whole)
            graph.erase_node(total)
            graph.erase_node(product)
    return found


def _split_addcmul(graph: Graph) -> list[tuple[Node, Node]]:
    """Calls of addcmul (torch 2.14 leaves them) become a product and a sum: these."""
    split = []
    for node in graph.find_nodes(op="call_function", target=aten.addcmul.default):
        if node.kwargs or not all(map(_is_plain, (node, *node.args))) or not any(_is_alike(each, node) for each in node.args[1:]):
            continue
        with graph.inserting_before(node):
            product = graph.call_function(aten.mul.Tensor, node.args[1:])
            total = graph.call_function(aten.add.Tensor, (node.args[0], product))
        product.meta["val"] = _value(node)
        total.meta.update(node.meta)
        split.append((product, total))
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    return split


def _fuse_norms(graph: Graph) -> int:
    """Rows that a norm, and perhaps a modulation, makes for a quantizer alone are normed in it: see kernels.reference.Normed. Returns in
    how many places."""
    found = 0
    for node in graph.find_nodes(op="call_function", target=ops.quant_rows.default):
        x, group, act, pre_quant_scale, kernel = node.args
        if act == "none" and (normed := _normed(_made_for(x))) is not None:
            _replace(graph, node, ops.norm_quant_rows.default, (*normed, group, pre_quant_scale, kernel))
            found += 1
    return found


def _fuse_activations(graph: Graph) -> int:
    """Rows that GELU (tanh) makes for a quantizer alone come out of it in the quantizer. Returns in how many places."""
    found = 0
    for node in graph.find_nodes(op="call_function", target=ops.quant_rows.default):
        rows, group, act, pre_quant_scale, kernel = node.args
        k = _value(rows).shape[-1]
        if act == "none" and isinstance(k, int) and (x := _before_gelu(_made_for(rows))) is not None:
            with graph.inserting_before(node):
                flat = graph.call_function(aten.reshape.default, (x, [-1, k]))
            flat.meta["val"] = _value(x).reshape(-1, k)
            _replace(graph, node, ops.quant_rows.default, (flat, group, "gelu_tanh", pre_quant_scale, kernel))
            found += 1
    return found


def _fuse_residuals(graph: Graph) -> int:
    """Products that are only there to be added to a residual, perhaps times a gate, are added in their kernel: see
    kernels.reference.Added. Returns in how many places."""
    found = 0
    for node in graph.find_nodes(op="call_function", target=ops.int8_gemm.default):
        if (total := _added(node)) is not None:
            *operands, _, kernel = node.args
            dtype = ops.DTYPE_NAMES[_value(total.node).dtype]
            _replace(graph, total.node, ops.int8_gemm_added.default, (*operands, total.residual, total.gate, dtype, kernel))
            found += 1
    return found


def _replace(graph: Graph, node: Node, target: Callable, args: tuple) -> None:
    with graph.inserting_before(node):
        fused = graph.call_function(target, args)
    # Not what else inductor notes of a call: its arguments.
    fused.meta.update((key, node.meta[key]) for key in ("val", "stack_trace") if key in node.meta)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)


class _Steps:
    """What is done to a value by operations with one other operand, from the last to the first. node: the value before them."""

    def __init__(self, node: Node):
        self.node = node
        self._uses = 1  # of node, by the steps after it

    def take(self, target: Callable, fits: Callable[[Node, Node], bool]) -> Node | None:
        """The other operand of the last step, if that is target of one that fits."""
        self._skip()
        for value, other in _operands(self.node, target) if self._is_passed_on() else ():
            if _is_alike(value, self.node) and fits(other, self.node):
                self.node, self._uses = value, 1
                return other
        return None

    def take_one_plus(self) -> Node | None:
        """f of a last step x + x * f, which is x * (1 + f) up to a rounding in fp32."""
        self._skip()
        for value, product in _operands(self.node, aten.add.Tensor) if self._is_passed_on() else ():
            for factored, other in _operands(product, aten.mul.Tensor) if len(product.users) == 1 else ():
                if _source(factored) is _source(value) and _is_alike(value, self.node) and _is_of_channels(other, self.node):
                    self.node, self._uses = _source(value), 2
                    return other
        return None

    def _skip(self) -> None:
        while self._is_passed_on() and (before := _unchanged(self.node)) is not None:
            self.node, self._uses = before, 1

    def _is_passed_on(self) -> bool:
        return len(self.node.users) == self._uses


def _normed(x: Node) -> tuple | None:
    """Arguments of norm_quant_rows, up to plus_one, for rows x; None where no norm makes them."""
    steps = _Steps(x)
    shift = steps.take(aten.add.Tensor, _is_of_channels)
    factor = steps.take_one_plus()
    plus_one = factor is not None
    if not plus_one:
        factor = steps.take(aten.mul.Tensor, _is_of_channels)
    bias = steps.take(aten.add.Tensor, _is_of_all_rows)
    weight = steps.take(aten.mul.Tensor, _is_of_all_rows)
    rstd = steps.take(aten.mul.Tensor, _is_of_rows)
    if rstd is None:
        return None
    mean = steps.take(aten.sub.Tensor, _is_of_rows)
    # What computes mean and rstd casts for itself, and kernels cast what they read.
    base, weight, bias, factor, shift = (node and _uncast(node) for node in (steps.node, weight, bias, factor, shift))
    if factor is not None and not plus_one and _is_plain(before := _scaled(factor, 1, aten.add.Tensor)):
        factor, plus_one = before, True
    return base, mean, rstd, weight, bias, factor, shift, plus_one


def _before_gelu(y: Node) -> Node | None:
    """x of y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x))), as torch decomposes it."""
    y = _source(y)
    for half, one_plus in _operands(y, aten.mul.Tensor) if len(y.users) == 1 else ():
        x, tanh = _scaled(half, 0.5), _scaled(one_plus, 1, aten.add.Tensor)
        if x is None or tanh is None or not _is(tanh, aten.tanh.default):
            continue
        for same, cubic in _operands(_scaled(tanh.args[0], math.sqrt(2 / math.pi)), aten.add.Tensor):
            for square, factor in _operands(_scaled(cubic, 0.044715), aten.mul.Tensor):
                if same is factor is x and _is(square, aten.mul.Tensor) and square.args == (x, x):
                    return _uncast(x)
    return None


class _Total(NamedTuple):
    node: Node
    residual: Node
    gate: Node | None


def _added(product: Node) -> _Total | None:
    """The sum that is all that a product is for."""
    gate, node = None, product
    while len(node.users) == 1:
        (user,) = node.users
        if not _is_plain(user):
            return None
        if _unchanged(user) is node or (_is(user, *VIEWS) and _has_rows_of(node, user)):
            node = user
            continue
        if not _is_alike(node, user):
            return None
        others = [other for value, other in _operands(user, aten.add.Tensor) if value is node and _is_residual(other, user)]
        if others:
            return _Total(user, others[0], gate and _uncast(gate))
        others = [other for value, other in _operands(user, aten.mul.Tensor) if value is node and _is_of_channels(other, user)]
        if gate is not None or not others:
            return None
        gate, node = others[0], user
    return None


def _is(node: Node, *targets: Callable) -> bool:
    return node.op == "call_function" and node.target in targets


def _value(node: Node) -> torch.Tensor:
    return node.meta["val"]


def _is_plain(node: object) -> bool:
    """Whether node is a tensor of a type that kernels compute with in fp32 and lose nothing of."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in PLAIN


def _is_alike(node: Node, of: Node) -> bool:
    """Whether both have one shape: what is broadcast has fewer rows than what becomes of it."""
    shape, whole = _value(node).shape, _value(of).shape
    return len(shape) == len(whole) and all(map(_same, shape, whole))


def _made_for(x: Node) -> Node:
    """What a quantizer's rows x are, before they were flattened for it alone."""
    while len(x.users) == 1 and _is(x, *VIEWS) and _is_plain(x.args[0]) and _has_rows_of(x.args[0], x):
        x = x.args[0]
    return x


def _scaled(node: Node, number: float, target: Callable = aten.mul.Tensor) -> Node | None:
    """The operand of a call of target with number."""
    if _is(node, target) and not node.kwargs and type(node.args[1]) in (int, float) and math.isclose(node.args[1], number):
        return node.args[0]
    return None


def _operands(node: Node | None, target: Callable) -> Iterator[tuple[Node, Node]]:
    """(value, other operand) of a call of target with two plain tensors, each way round where that is the same."""
    if node is not None and _is(node, target) and not node.kwargs and _is_plain(node) and all(map(_is_plain, node.args)):
        left, right = node.args
        yield left, right
        if target is not aten.sub.Tensor:
            yield right, left


def _unchanged(node: Node) -> Node | None:
    """What node only copies (dropout that is off), casts to another float type, or multiplies by 1 (addcmul's value)."""
    if not _is_plain(node) or node.op != "call_function" or not node.args or not _is_plain(node.args[0]):
        return None
    return node.args[0] if _is(node, aten.clone.default, CAST) or _scaled(node, 1) is not None else None


def _source(node: Node) -> Node:
    """What node is unchanged, through what nothing else uses."""
    while len(node.users) == 1 and (before := _unchanged(node)) is not None:
        node = before
    return node


def _uncast(node: Node) -> Node:
    """node before it was cast to a wider type."""
    while _is(node, CAST) and _is_plain(node.args[0]) and _value(node.args[0]).itemsize < _value(node).itemsize:
        node = node.args[0]
    return node


def _same(left: torch.types.IntLikeType, right: torch.types.IntLikeType) -> bool:
    return statically_known_true(left == right)


def _has_rows_of(node: Node, view: Node) -> bool:
    """Whether the last dimension of both is the same."""
    return _value(node).dim() > 0 < _value(view).dim() and _same(_value(node).shape[-1], _value(view).shape[-1])


def _is_of_rows(node: Node, of: Node) -> bool:
    """Whether node is [..., 1] for of [..., K]."""
    shape, whole = _value(node).shape, _value(of).shape
    return len(shape) == len(whole) and _same(shape[-1], 1) and all(map(_same, shape[:-1], whole[:-1]))


def _is_of_all_rows(node: Node, of: Node) -> bool:
    """Whether node is [K] for of [..., K], perhaps with ones before it."""
    return _is_of_channels(node, of) and all(_same(size, 1) for size in _value(node).shape[:-1])


def _is_of_channels(node: Node, of: Node) -> bool:
    """Whether node is [K] for of [..., K], or [B, 1, K] for [B, T, K]: some leading dimensions of of, then ones."""
    shape, whole = _value(node).shape, _value(of).shape
    if not shape or not _same(shape[-1], whole[-1]) or len(shape) > len(whole):
        return False
    leading = shape[:-1]
    own = len(leading)
    while own and _same(leading[own - 1], 1):
        own -= 1
    return own == 0 or (len(shape) == len(whole) and own < len(whole) - 1 and all(map(_same, leading[:own], whole)))


def _is_residual(node: Node, total: Node) -> bool:
    """Whether node has the type and shape of total, and lies in memory anyway. A total lies there as its kernel writes it: one row after
    the other, which a sum with a permuted residual does not."""
    value, whole = _value(node), _value(total)
    made_for_it = node.op == "call_function" and len(node.users) == 1 and torch.Tag.pointwise in getattr(node.target, "tags", ())
    return not made_for_it and value.dtype == whole.dtype and _is_alike(node, total) and _is_dense(whole)


def _is_dense(value: torch.Tensor) -> bool:
    """Whether value is known to be contiguous."""
    expected: torch.types.IntLikeType = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride())):
        if not _same(size, 1) and not _same(stride, expected):
            return False
        expected = expected * size
    return True
