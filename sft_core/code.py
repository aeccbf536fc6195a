"""Code identity: a digest over what a builder executes, blind to comments, docstrings and formatting.

The closure of a builder is its module and the project modules that these import, at the top or inside a
function. Imports under `if TYPE_CHECKING:` run nothing and do not count. An import whose target cannot be
read off the source is refused, for it could be missed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

PROJECT_PACKAGES = ("steps", "sft_core")
ROOT = Path(__file__).resolve().parent.parent


def code_digest(module: str, libraries: tuple[str, ...] = ()) -> str:
    """SHA-256 (hex) of the closure of `module` and of the versions of libraries that shape its bytes.

    Raises ValueError where a module of the closure imports dynamically.
    """
    digest = hashlib.sha256()
    for name in closure(module):
        digest.update(f"{name}\0{_read(name).executed}\0".encode())
    for library in sorted(libraries):
        digest.update(f"{library}=={importlib.metadata.version(library)}\0".encode())
    return digest.hexdigest()


def closure(module: str) -> list[str]:
    """The project modules that `module` can execute, itself included, sorted by name."""
    found: set[str] = set()
    waiting = [module, *(name for name in _with_parents(module) if _path(name))]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(_read(name).imports)
    return sorted(found)


class _Module(NamedTuple):
    executed: str  # the syntax tree without positions, comments and docstrings
    imports: frozenset[str]


def _read(module: str) -> _Module:
    path = _path(module)
    if path is None:
        raise ValueError(f"{module}: no such module")
    stat = path.stat()
    return _parse(module, path, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _parse(module: str, path: Path, mtime_ns: int, size: int) -> _Module:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imports = frozenset(_imports(tree, module, is_package=path.name == "__init__.py"))
    return _Module(ast.dump(_WithoutDocstrings().visit(tree)), imports)


def _path(module: str) -> Path | None:
    """The module's file, found without importing its package."""
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


class _WithoutDocstrings(ast.NodeTransformer):
    def _strip(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        body = node.body  # type: ignore[attr-defined]
        first = body[0].value if body and isinstance(body[0], ast.Expr) else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _strip  # noqa: N815


def _imports(tree: ast.Module, module: str, *, is_package: bool) -> set[str]:
    found: set[str] = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
                if node.level
                else [node.module]
            )
            found.update(".".join([*base, alias.name]) for alias in node.names)  # a module, or a name in one
        if _DYNAMIC.intersection(_names(node)):
            line = getattr(node, "lineno", "?")
            raise ValueError(f"{module}, line {line}: a dynamic import in a builder's code cannot be tracked")
        waiting.extend(ast.iter_child_nodes(node))
    ours = (name for name in found if name.split(".")[0] in PROJECT_PACKAGES)
    return {part for name in ours for part in _with_parents(name) if _path(part) is not None}


_DYNAMIC = frozenset({"__import__", "import_module", "run_module", "run_path"})


def _names(node: ast.AST) -> list[str]:
    """What the node itself refers to by name, under whatever other name it is imported."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
