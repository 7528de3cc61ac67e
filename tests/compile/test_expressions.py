"""Conditions on sizes in a manifest, evaluated without eval."""
from __future__ import annotations

import itertools

import pytest
from int8_compile.compile.artifacts.shape_expressions import parse_expression

PRINTED = {
    "d0": lambda d0, d1: d0, "3*d0 + d1": lambda d0, d1: 3 * d0 + d1, "d0*d1 // 2": lambda d0, d1: d0 * d1 // 2,
    "d0 % 4 == 0": lambda d0, d1: d0 % 4 == 0, "d0 != 1": lambda d0, d1: d0 != 1, "-d1 + 2*d0": lambda d0, d1: 2 * d0 - d1,
    "d0**2 >= d1": lambda d0, d1: d0**2 >= d1, "2 <= d1 and d1 < 9 or d0 == 5": lambda d0, d1: 2 <= d1 < 9 or d0 == 5,
    "not d0 == d1": lambda d0, d1: d0 != d1, "max(1, d0, d1 - 2)": lambda d0, d1: max(1, d0, d1 - 2),
    "min(d0, (d1 + 7) // 8) > 1": lambda d0, d1: min(d0, (d1 + 7) // 8) > 1,
}


@pytest.mark.parametrize("text", PRINTED)
def test_a_condition_is_what_python_makes_of_it(text):
    evaluate = parse_expression(text)
    for d0, d1 in itertools.product((1, 2, 5, 64), (1, 3, 8, 4096)):
        assert evaluate({"d0": d0, "d1": d1}) == PRINTED[text](d0, d1)


@pytest.mark.parametrize("text", ["__import__('os')", "d0.real", "(lambda: 1)()", "[d0][0]", "'text'", "open(d0)", "1 < d0 < 3"])
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ValueError, match="a condition on sizes has"):
        parse_expression(text)
