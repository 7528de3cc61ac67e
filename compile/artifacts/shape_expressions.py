"""Conditions on sizes, as torch prints them, without eval: an artifact's manifest is data."""
from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Evaluate = Callable[[Mapping[str, int]], Any]

OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.USub: operator.neg, ast.Not: operator.not_,
}
FUNCTIONS: dict[str, Callable] = {"min": min, "max": max}


def parse_expression(text: str) -> Evaluate:
    """Of arithmetic, comparisons, and, or, min and max of names and numbers. Raises ValueError for anything else."""
    return _evaluator(ast.parse(text, mode="eval").body)


def _evaluator(node: ast.expr) -> Evaluate:
    match node:
        case ast.Constant(value=int() | float() as value):
            return lambda sizes: value
        case ast.Name(id=name):
            return lambda sizes: sizes[name]
        case ast.BinOp(left, op, right) | ast.Compare(left, [op], [right]) if type(op) in OPERATORS:
            apply, a, b = OPERATORS[type(op)], _evaluator(left), _evaluator(right)
            return lambda sizes: apply(a(sizes), b(sizes))
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            apply, a = OPERATORS[type(op)], _evaluator(operand)
            return lambda sizes: apply(a(sizes))
        case ast.BoolOp(op, values):
            combine, parts = all if isinstance(op, ast.And) else any, [_evaluator(value) for value in values]
            return lambda sizes: combine(part(sizes) for part in parts)
        case ast.Call(ast.Name(id=name), args, []) if name in FUNCTIONS:
            call, parts = FUNCTIONS[name], [_evaluator(arg) for arg in args]
            return lambda sizes: call(part(sizes) for part in parts)
    raise ValueError(f"a condition on sizes has {ast.unparse(node)[:100]!r}")


class SizeConditions:
    """What the sizes of a call's leaves must be: "leaves", "ranges" and "guards" of a manifest's body. Raises ValueError for texts that
    parse_expression does not take."""

    def __init__(self, body: Mapping):
        self._shapes = [shape for _, shape, _ in body["leaves"]]
        self._ranges = [(name, low, high) for name, (low, high) in body["ranges"].items()]
        self._names = {name for name, _, _ in self._ranges}
        self._guards = [parse_expression(text) for text in body["guards"]]
        self._expressions = {size: parse_expression(size) for shape in self._shapes for size in shape
                             if isinstance(size, str) and size not in self._names}

    def hold_for(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Asked before each block: of as many dims as the leaves have."""
        sizes: dict[str, int] = {}
        late = []
        for shape, expected_shape in zip(shapes, self._shapes):
            for size, expected in zip(shape, expected_shape):
                if type(expected) is int:
                    if size != expected:
                        return False
                elif expected not in self._names:
                    late.append((size, expected))
                elif sizes.setdefault(expected, size) != size:
                    return False
        try:
            return (all(low <= sizes.get(name, 0) <= high for name, low, high in self._ranges)
                    and all(self._expressions[expected](sizes) == size for size, expected in late)
                    and all(guard(sizes) for guard in self._guards))
        except ZeroDivisionError:  # a quotient that is 0 for these sizes
            return False
