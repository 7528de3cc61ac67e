"""Which decisions about CUDA the pack has taken, and which way: its modules are loaded with each of them reporting what came out.

A decision is an operand of a condition (if, while, conditional expression, comprehension, and, or, assert) that names CUDA: a name or
attribute with "cuda" in it, or the text "cuda". Beside them, every statement that names CUDA reports that it has run.
"""
from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path

REPORT = "__rehearsal_visited__"
REPO = Path(__file__).resolve().parents[2]
PARTS = ("compile", "int8", "nodes")
# (file, line, text, outcome): outcome is True or False of a decision, None of a statement
Visit = tuple[str, int, str, "bool | None"]


def names_cuda(node: ast.AST) -> bool:
    for part in ast.walk(node):
        name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
        if "cuda" in name.lower() or (isinstance(part, ast.Constant) and part.value == "cuda"):
            return True
    return False


class _Instrument(ast.NodeTransformer):
    """Sets reports into a module. found: what there is to visit."""

    def __init__(self, file: str, source: str):
        self.file, self.source = file, source
        self.found: set[Visit] = set()

    def _text(self, node: ast.AST) -> str:
        return " ".join(ast.get_source_segment(self.source, node).split())

    def _report(self, node: ast.AST, text: str, *value: ast.expr) -> ast.Call:
        arguments = [ast.Constant(self.file), ast.Constant(node.lineno), ast.Constant(text), *value]
        return ast.copy_location(ast.Call(ast.Name(REPORT, ast.Load()), arguments, []), node)

    def _condition(self, test: ast.expr) -> ast.expr:
        """test with its operands reported."""
        if isinstance(test, ast.BoolOp):
            test.values = [self._condition(value) for value in test.values]
        elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test.operand = self._condition(test.operand)
        elif names_cuda(test):
            text = self._text(test)
            self.found |= {(self.file, test.lineno, text, outcome) for outcome in (True, False)}
            return self._report(test, text, self.visit(test))
        else:
            return self.visit(test)
        return test

    def visit_If(self, node):
        node.test = self._condition(node.test)
        node.body, node.orelse = self._block(node.body), self._block(node.orelse)
        return node

    def visit_IfExp(self, node):
        node.test, node.body, node.orelse = self._condition(node.test), self.visit(node.body), self.visit(node.orelse)
        return node

    def visit_While(self, node):
        node.test, node.body, node.orelse = self._condition(node.test), self._block(node.body), self._block(node.orelse)
        return node

    def visit_BoolOp(self, node):
        """Outside of a condition the last operand decides nothing here."""
        node.values = [*map(self._condition, node.values[:-1]), self.visit(node.values[-1])]
        return node

    def visit_comprehension(self, node):
        node.iter, node.ifs = self.visit(node.iter), [self._condition(test) for test in node.ifs]
        return node

    def visit_FunctionDef(self, node):
        if any("jit" in self._text(decorator) for decorator in node.decorator_list):
            return node  # Triton compiles its text
        node.body = self._block(node.body)
        return node

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        done = []
        for statement in statements:
            simple = not hasattr(statement, "body") and not isinstance(statement, (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal))
            docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if simple and not docstring and names_cuda(statement):
                text = self._text(statement)
                self.found.add((self.file, statement.lineno, text, None))
                done.append(ast.copy_location(ast.Expr(self._report(statement, text)), statement))
            done.append(self.visit(statement))
        return done

    def generic_visit(self, node):
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt) and not isinstance(node, (ast.Module, ast.ClassDef)):
                setattr(node, field, self._block(value))
            elif isinstance(value, list):
                setattr(node, field, [self.visit(item) if isinstance(item, ast.AST) else item for item in value])
            elif isinstance(value, ast.AST):
                setattr(node, field, self.visit(value))
        return node


def instrument(file: str, source: str) -> tuple[ast.Module, set[Visit]]:
    """(source with its reports, all that there is to visit in it)"""
    transformer = _Instrument(file, source)
    tree = transformer.visit(ast.parse(source))
    return ast.fix_missing_locations(tree), transformer.found


def instrumented(path: Path) -> tuple[ast.Module, set[Visit]]:
    """instrument of a module of the pack"""
    return instrument(path.relative_to(REPO).as_posix(), path.read_text(encoding="utf-8"))


def all_visits() -> set[Visit]:
    """What there is to visit in the pack."""
    return {visit for path in _files() for visit in instrumented(path)[1]}


def _files() -> Iterator[Path]:
    for part in PARTS:
        yield from sorted((REPO / part).rglob("*.py"))


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        path = self.get_filename(fullname)
        return compile(instrumented(Path(path))[0], path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname.startswith("int8_compile.") else None
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return None
        if Path(spec.origin).relative_to(REPO).parts[0] in PARTS:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def watch() -> set[Visit]:
    """The pack, which must not be imported yet, reports from now on: -> the visits, as they come."""
    import builtins

    visited: set[Visit] = set()

    def report(file, line, text, *value):
        visited.add((file, line, text, bool(value[0]) if value else None))
        return value[0] if value else None
    setattr(builtins, REPORT, report)
    sys.meta_path.insert(0, _Finder())
    return visited
