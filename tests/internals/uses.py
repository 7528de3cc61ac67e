"""Where the pack names something private of torch, Triton, ComfyUI or comfy_kitchen, found in its sources; and whether a release has it."""
from __future__ import annotations

import ast
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PARTS = ("compile", "int8", "nodes")
PACKAGES = ("torch", "triton", "comfy", "comfy_api", "comfy_execution", "comfy_kitchen", "comfy_aimdo")
_PRIVATE = re.compile(r"_[a-zA-Z]\w*")
# Of namedtuples, and of Python's own modules.
_PYTHON = {"_replace", "_asdict", "_fields"}


def _is_private(name: str) -> bool:
    return _PRIVATE.fullmatch(name) is not None and name not in _PYTHON


class _Uses(ast.NodeVisitor):
    """found: {dotted name from a package's root, or ".name" of an object: lines}"""

    def __init__(self, own: set[str]):
        self.own = own
        self.modules: dict[str, str] = {}
        self.foreign: set[str] = set()  # what is imported from elsewhere
        self.found: dict[str, list[int]] = {}

    def visit_Import(self, node):
        for alias in node.names:
            root = alias.name.partition(".")[0]
            if root not in PACKAGES:
                self.foreign.add(alias.asname or root)
                continue
            self.modules[alias.asname or root] = alias.name if alias.asname else root
            self._add(alias.name, node)

    def visit_ImportFrom(self, node):
        if node.level or node.module.partition(".")[0] not in PACKAGES:
            self.foreign |= {alias.asname or alias.name for alias in node.names} if not node.level else set()
            return
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self.modules[alias.asname or alias.name] = name
            self._add(name, node)

    def visit_Attribute(self, node):
        names, base = [node.attr], node.value
        while isinstance(base, ast.Attribute):
            names.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name) and base.id in self.modules:
            self._add(".".join((self.modules[base.id], *names)), node)
            return
        if isinstance(base, ast.Name) and base.id in self.foreign:
            return
        if isinstance(base, ast.Name) and base.id == "self":
            names = names[1:] if names[0] in self.own else names
        for name in names:
            if _is_private(name) and name not in self.own:
                self.found.setdefault(f".{name}", []).append(node.lineno)
        self.generic_visit(base)

    def visit_Constant(self, node):
        """The name of an attribute, for getattr and __dict__."""
        if isinstance(node.value, str) and _is_private(node.value) and node.value not in self.own:
            self.found.setdefault(f".{node.value}", []).append(node.lineno)

    def _add(self, name: str, node):
        parts = name.split(".")
        private = [index for index, part in enumerate(parts) if _is_private(part)]
        if private:
            # A name of a module below a private package counts as itself, what is further inside does not.
            self.found.setdefault(".".join(parts[:private[-1] + 3]), []).append(node.lineno)


def _own(tree: ast.Module) -> set[str]:
    """Private attributes that a module of the pack gives to objects of its own classes."""
    found = set()
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(cls):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") in ("self",):
                found.add(node.attr)
        found |= {node.id for statement in cls.body for node in ast.walk(statement) if isinstance(node, ast.Name)
                  and isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(node.ctx, ast.Store)}
    return {name for name in found if name.startswith("_")}


def uses(root: Path = REPO) -> dict[str, list[str]]:
    """{name: ["file:line"]} of what is private and not the pack's own. ".name": an attribute of an object whose type is not known here."""
    paths = [path for part in PARTS for path in sorted((root / part).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    own = set().union(*map(_own, trees.values()))
    found: dict[str, list[str]] = {}
    for path, tree in trees.items():
        visitor = _Uses(own)
        visitor.visit(tree)
        for name, lines in visitor.found.items():
            found.setdefault(name, []).extend(f"{path.relative_to(root).as_posix()}:{line}" for line in lines)
    # A package is there where something in it is.
    return {name: places for name, places in found.items() if not any(other.startswith(f"{name}.") for other in found)}


class Release:
    """An installed or unpacked package, read and never run. folder: what holds its top package, such as site-packages."""

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, name: str) -> bool:
        """Whether the dotted name is there: a module, or what its text defines or imports; of compiled modules what their stubs name, or
        their symbols and strings."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            files, rest = self._files(parts[:length]), parts[length:]
            if files:
                break
        else:
            return False
        if not rest:
            return True
        if rest[0] in _SETTINGS and any("install_config_module" in _text(file) for file in files):
            return self.mentions("torch/utils/_config_module.py", rest[0])
        for file in files:
            if self._defines(file, rest[0]):
                sources = (file, *self._origins(file, rest[0]))
                return len(rest) == 1 or any(re.search(rf"\b{rest[1]}\b", _text(source)) for source in sources)
        compiled = "_C" in parts or parts[:2] == ["torch", "ops"] or len(parts) == 2
        return compiled and any(f"{parts[-1]}".encode() in _strings_of(binary) for binary in self._binaries(parts))

    def _files(self, module: list[str]) -> list[Path]:
        base = self.folder.joinpath(*module)
        candidates = (base / "__init__.py", base.with_suffix(".py"), base / "__init__.pyi", base.with_suffix(".pyi"))
        return [file for file in candidates if file.exists()]

    def _origins(self, file: Path, name: str) -> list[Path]:
        """The files that file imports name from."""
        found = []
        for node in ast.walk(ast.parse(_text(file))):
            if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
                package = list(file.parent.relative_to(self.folder).parts)
                base = package[:len(package) - node.level + 1] if node.level else []
                found += self._files([*base, *(node.module or "").split(".")])
        return found

    def mentions(self, file: str, name: str) -> bool:
        """Whether a file of the package uses name; False where there is no such file."""
        path = self.folder / file
        return path.exists() and re.search(rf"\b{re.escape(name)}\b", _text(path)) is not None

    def _defines(self, file: Path, name: str) -> bool:
        text = _text(file)
        if not re.search(rf"\b{re.escape(name)}\b", text):
            return False
        tree = ast.parse(text)
        # Beside definitions: names that a loop or a star import puts there, which only their own file can tell.
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
                return True
            imported = node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ()
            if any((alias.asname or alias.name).partition(".")[0] == name for alias in imported):
                return True
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
                return True
            if isinstance(node, ast.Constant) and node.value == name:  # __all__
                return True
        return False

    def _binaries(self, parts: list[str]) -> list[Path]:
        """What may hold compiled names: torch's libraries, else the extension module itself."""
        if parts[0] == "torch":
            return [file for name in ("libtorch_python", "libtorch_cpu") for file in (self.folder / "torch" / "lib").glob(f"{name}.*")]
        return list(self.folder.joinpath(*parts[:parts.index("_C")]).glob("_C*.so"))


# What torch gives to each of its modules of settings.
_SETTINGS = {"patch", "get_config_copy"}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


_CACHE: dict[Path, bytes] = {}


def _strings_of(path: Path) -> bytes:
    if path not in _CACHE:
        _CACHE.clear()  # one at a time: they are large
        _CACHE[path] = path.read_bytes()
    return _CACHE[path]
