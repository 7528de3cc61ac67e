"""Each error and warning of the pack is in a help page, with its solution; and no page explains one that is gone."""
from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
DOCS = REPO / "web" / "docs"
DEVELOPERS = "errors.md"  # what a workflow cannot cause: the programming interface, and reasons that another message quotes
HOLE = "…"
SOURCES = [*sorted(p for folder in ("nodes", "compile", "int8") for p in (REPO / folder).rglob("*.py")), *sorted(REPO.glob("check*.py"))]
# What a page quotes is the message, or its beginning up to one of these.
END = re.compile(r"[.:;,](?=\s|$)|(?=\s\()|$")
LEAST = 12  # characters besides holes that a quote has at least


class Messages(ast.NodeVisitor):
    """(line, message) of everything that is raised, warned of or reported as done without; HOLE for what is known when it runs."""

    def __init__(self, tree: ast.Module):
        self.found: list[tuple[int, str]] = []
        self._scopes = [_strings(tree.body)]
        self.visit(tree)

    def visit_FunctionDef(self, node):
        self._scopes.append(_strings(ast.walk(node)))
        self.generic_visit(node)
        self._scopes.pop()

    def visit_Raise(self, node):
        if isinstance(node.exc, ast.Call) and node.exc.args:
            self._add(node.exc.args[0])
        self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("warning", "error", "exception", "_fall_back") and node.args:
            self._add(node.args[0])
        self.generic_visit(node)

    def _add(self, node):
        for text in self._texts(node):
            text = re.sub(r"(…\s*)+…", HOLE, re.sub(r"%(\.\d)?[sdfg]", HOLE, text)).replace("%%", "%")
            text = " ".join(text.split())
            if len(text.replace(HOLE, "").strip(" .:;,'()")) > 2:
                self.found.append((node.lineno, text))

    def _texts(self, node, depth: int = 0) -> list[str]:
        """All that this expression may be."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.JoinedStr):
            return ["".join(parts) for parts in itertools.product(*(self._texts(value, depth) for value in node.values))]
        if isinstance(node, ast.FormattedValue):
            return self._texts(node.value, depth) if node.format_spec is None else [HOLE]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return ["".join(parts) for parts in itertools.product(self._texts(node.left, depth), self._texts(node.right, depth))]
        if isinstance(node, ast.IfExp):
            return list(dict.fromkeys(self._texts(node.body, depth) + self._texts(node.orelse, depth)))
        if isinstance(node, ast.Name) and depth < 3:
            values = next((scope[node.id] for scope in reversed(self._scopes) if node.id in scope), [])
            return list(dict.fromkeys(text for value in values for text in self._texts(value, depth + 1))) or [HOLE]
        return [HOLE]


def _strings(nodes) -> dict[str, list[ast.expr]]:
    """Name -> what is assigned to it."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return found


def messages() -> list[tuple[str, str]]:
    """("folder/file.py:line", message)"""
    return [(f"{path.relative_to(REPO)}:{line}", text) for path in SOURCES for line, text in Messages(ast.parse(path.read_text())).found]


if __name__ == "__main__":
    for where, text in messages():
        print(where, "|", text)
