"""Conditions on sizes, as torch prints them, without eval: an artifact's manifest is data."""
from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
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
