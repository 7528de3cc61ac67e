"""Each error and warning of the pack is in a help page, with its solution; and no page explains one that is gone."""
from __future__ import annotations

import ast
import functools
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
FALLBACK_ARCH = 12  # characters besides holes that a quote has at least
TELLS = ("warning", "error", "exception", "fall_back", "_refuse")
REASONS = ("on_device", "artifact_refusal", "triton_unavailable", "beyond_guards")  # return what another message quotes


class Messages(ast.NodeVisitor):
    """(line, message) of everything that is raised, warned of or reported as done without; HOLE for what is known when it runs."""

    def __init__(self, tree: ast.Module, constants: dict[str, list[ast.expr]]):
        self.found: list[tuple[int, str]] = []
        self._scopes = [constants, _strings(tree.body)]
        self._gives_reasons = False
        self.visit(tree)

    def visit_FunctionDef(self, node):
        outside, self._gives_reasons = self._gives_reasons, node.name in REASONS
        self._scopes.append(_strings(ast.walk(node)))
        self.generic_visit(node)
        self._scopes.pop()
        self._gives_reasons = outside

    def visit_Return(self, node):
        if self._gives_reasons and node.value is not None:
            for value in node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]:
                self._add(value)
        self.generic_visit(node)

    def visit_Raise(self, node):
        if isinstance(node.exc, ast.Call) and node.exc.args and getattr(node.exc.func, "id", "") != "NotImplementedError":
            self._add(node.exc.args[0])
        self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Attribute) and node.args and (
                node.func.attr in TELLS or (node.func.attr == "append" and getattr(node.func.value, "attr", "") == "fallbacks")):
            self._add(node.args[0])
        self.generic_visit(node)

    def _add(self, node):
        for text in self._texts(node):
            text = _merged(re.sub(r"%(\.\d)?[sdfg]", HOLE, text).replace("%%", "%"))
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
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    constants: dict[str, list[ast.expr]] = {}
    for tree in trees.values():
        constants.update((name, values) for name, values in _strings(tree.body).items() if isinstance(values[0], ast.Constant))
    return [(f"{path.relative_to(REPO)}:{line}", text) for path, tree in trees.items() for line, text in Messages(tree, constants).found]


def _merged(text: str) -> str:
    """With one HOLE for several in a row, such as '…: …'."""
    return re.sub(f"{HOLE}([\\s.:]*{HOLE})+", HOLE, " ".join(text.split()))


def beginnings(message: str) -> list[re.Pattern]:
    """What a page may quote of a message: all of it, or its beginning up to the end of a clause."""
    cuts = {message[:match.start()] for match in END.finditer(message)}
    whole = _trimmed(message)
    return [_pattern(cut) for cut in {whole, *map(_trimmed, cuts)} if cut == whole or len(cut.replace(HOLE, "")) >= FALLBACK_ARCH]


def _trimmed(text: str) -> str:
    return text.rstrip(" .:;,")


def _pattern(text: str) -> re.Pattern:
    """A page may also say what is known only when it runs: 'velocator is not installed' for '… is not installed'. A HOLE at the end is a
    word, not all that may follow."""
    pattern = ".+".join(map(re.escape, text.split(HOLE)))
    return re.compile(re.sub(r"\.\+$", r"\\S+", pattern))


def rows(page: Path) -> list[tuple[list[str], str]]:
    """(messages quoted, what to do) of each item of the lists, and row of the tables, below headings that begin with "Errors". Lists read
    better: the help panel is too narrow for tables of sentences."""
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    listed = [section for section in sections if section.startswith("Errors")]
    lines = [line for section in listed for line in section.splitlines() if line.startswith(("- `", "| `"))]
    cells = [re.split(r"(?<=`)(?:: | \| )", line.removesuffix(" |"), maxsplit=1) for line in lines]
    return [([_merged(quote) for quote in re.findall(r"`([^`]+)`", message)], remedy) for message, remedy in cells]


def quoted_by(message: str, page_quotes: list[str]) -> bool:
    return any(pattern.fullmatch(_trimmed(quote)) for pattern in beginnings(message) for quote in page_quotes)


@pytest.fixture(scope="module")
def pages() -> dict[str, list[str]]:
    return {page.name: [quote for quoted, _ in rows(page) for quote in quoted] for page in sorted(DOCS.glob("*.md"))}


@pytest.mark.parametrize(("where", "message"), messages(), ids=lambda value: value[:60])
def test_every_message_is_explained(pages, where, message):
    on = [name for name, page_quotes in pages.items() if quoted_by(message, page_quotes)]
    assert on, (f"{where}: no page of web/docs explains\n    {message}\nAdd an item to 'Errors and solutions' of each node that says it, "
                f"or to {DEVELOPERS} if no workflow can cause it: - `{message}`: what to change")
    title = next((title for title in titles() if message.startswith((f"{title}:", f"{title} needs"))), None)
    if title:
        assert f"{titles()[title]}.md" in on, f"{where}: '{message}' is of the node {title}; its own page must explain it"


def test_every_explained_message_is_one_that_the_code_has(pages):
    known = [pattern for _, message in messages() for pattern in beginnings(message)]
    gone = [(name, quote) for name, page_quotes in pages.items() for quote in page_quotes
            if not any(pattern.fullmatch(_trimmed(quote)) for pattern in known)]
    assert not gone, "explained, but no code says so (take the item out, or quote the message up to the end of a clause)"


def test_every_item_says_what_to_do():
    assert not [(page.name, quoted) for page in DOCS.glob("*.md") for quoted, remedy in rows(page) if len(remedy) < len("As above.")]


@functools.cache
def titles() -> dict[str, str]:
    """display_name -> node id"""
    found = {}
    for path in (REPO / "nodes").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {name: values[0].value for name, values in _strings(tree.body).items() if isinstance(values[0], ast.Constant)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Schema":
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                title = given["display_name"]
                found[title.value if isinstance(title, ast.Constant) else names[title.id]] = given["node_id"].value
    return found


def test_every_node_has_a_page(pages):
    assert {f"{node_id}.md" for node_id in titles().values()} == set(pages) - {DEVELOPERS}


@pytest.mark.parametrize(("code", "found"), [
    ('raise ValueError(f"{a} is too {\'large\' if b else \'small\'}: {c:.1f} MB.")', ["… is too large: … MB.", "… is too small: … MB."]),
    ('logger.warning("%s: %d of %d left", a, b, c)', ["… of … left"]),
    ('def f():\n    why = "it is late"\n    raise Unsupported(why)', ["it is late"]),
    ('def on_device():\n    return self, "not here"', ["not here"]),
    ('self.fall_back("slowly" + f" {x}")', ["slowly …"]),
    ('logger.info("well")', []),
])
def test_what_counts_as_a_message(code, found):
    assert [text for _, text in Messages(ast.parse(code), {}).found] == found


def test_a_quote_must_be_exact_up_to_the_end_of_a_clause():
    message = "Load it: '…' is damaged (…). Download it again."
    for quote in (message, message[:-1], "Load it: '…' is damaged", "Load it: 'a.safetensors' is damaged (…)."):
        assert quoted_by(message, [quote]), quote
    for quote in ("Load it", "Load it: '…' is", "Load it: '…' is broken", "is damaged (…)", "Load it: '…' is damaged (…). Download"):
        assert not quoted_by(message, [quote]), quote
