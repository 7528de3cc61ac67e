"""The table of ComfyUIs and packages that the pack was run with."""
from __future__ import annotations

import datetime
import re

import pytest

from benchmarks import matrix

CASE = '<testcase name="test_{}[flux]">{}</testcase>'


def report(*cases):
    return f"<testsuites><testsuite>{''.join(CASE.format(*case) for case in cases)}</testsuite></testsuites>"


@pytest.mark.parametrize("cases, text", [
    ([("a", ""), ("b", "")], "holds (2)"),
    ([("a", ""), ("b", "<skipped/>")], "holds (1, 1 skipped)"),
    ([("a", "<failure/>"), ("a", "<error/>"), ("b", ""), ("c", "<skipped/>")], "2 of 3 fail: test_a"),
    ([(name, "<failure/>") for name in "abcde"], "5 of 5 fail: test_a, test_b, test_c and 2 more"),
    ([("a", ""), ("b", '<skipped message="x"/>'), ("c", '<skipped message="x"/>'), ("d", '<skipped message="y"/>')],
     "holds (1, 3 skipped: x; y)"),
    ([("a", "<skipped/>")], "not run: nothing to run"),
    ([("a", '<skipped message="x"/>')], "not run: x"),
    ([], "not run: nothing to run"),
])
def test_a_cell_says_how_many_tests_ran_or_which_failed(cases, text):
    assert matrix.cell(report(*cases)) == text


def test_the_table_is_dated_and_names_what_each_column_ran():
    columns = list(matrix.COLUMNS)
    rows = [matrix.Row("0.33.0", ["2.11.0", "0.2.31", "0.4.13", "1.49.6"], dict.fromkeys(columns, "holds (1)"))]
    page = matrix.table(rows, columns, datetime.date(2026, 11, 26))
    assert "2026-11-26" in page and "| 0.33.0 | 2.11.0 | 0.2.31 | 0.4.13 | 1.49.6 | holds (1) |" in page
    assert all(f"- {column}: `tests/" in page for column in columns)
    assert all((matrix.REPO / argument).exists() for arguments in matrix.COLUMNS.values() for argument in arguments if "/" in argument)


@pytest.mark.parametrize("column", matrix.COLUMNS)
def test_each_word_that_chooses_a_columns_tests_names_one(column):
    files = [argument for argument in matrix.COLUMNS[column] if argument.endswith(".py")]
    names = re.findall(r"def (test_\w+)", "\n".join((matrix.REPO / file).read_text() for file in files))
    words = {word for argument in matrix.COLUMNS[column] if argument not in files for word in re.findall(r"\w{4,}", argument)}
    assert all(any(word in name for name in names) for word in words), words


def test_int8_is_not_run_where_comfyui_has_none(tmp_path):
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.22.0"\n')
    assert matrix.run_cell(tmp_path, "python", "", "INT8") == "not run: no native INT8 before 0.26.0"
