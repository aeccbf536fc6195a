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
import importlib.util
from pathlib import Path

PROJECT_PACKAGES = ("steps", "sft_core")


def code_digest(module: str, libraries: tuple[str, ...] = ()) -> str:
    """SHA-256 (hex) of the closure of `module` and of the versions of libraries that shape its bytes.

    Raises ValueError where a module of the closure imports dynamically.
    """
    digest = hashlib.sha256()
    for name in closure(module):
        digest.update(f"{name}\0{_executed(_source(name))}\0".encode())
    for library in sorted(libraries):
        digest.update(f"{library}=={importlib.metadata.version(library)}\0".encode())
    return digest.hexdigest()


def closure(module: str) -> list[str]:
    """The project modules that `module` can execute, itself included, sorted by name."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting.extend(_imports(_source(name), name))
    return sorted(found)


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{module}: no such module")
    return Path(spec.origin)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _executed(path: Path) -> str:
    """The module's syntax tree without positions, comments and docstrings."""
    return ast.dump(_WithoutDocstrings().visit(_parse(path)))


class _WithoutDocstrings(ast.NodeTransformer):
    def _strip(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        body = node.body  # type: ignore[attr-defined]
        if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            if isinstance(body[0].value.value, str):
                node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _strip  # noqa: N815


def _imports(path: Path, module: str) -> set[str]:
    found: set[str] = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    waiting: list[ast.AST] = [_parse(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _DYNAMIC:
            raise ValueError(f"{module}, line {node.lineno}: a dynamic import in a builder's code cannot be tracked")
        waiting.extend(ast.iter_child_nodes(node))
    parts = (name for name in found if name.split(".")[0] in PROJECT_PACKAGES)
    return {name for part in parts for name in _with_parents(part) if _is_module(name)}


_DYNAMIC = ("__import__", "import_module", "importlib.import_module", "runpy.run_module", "runpy.run_path")


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


@functools.lru_cache(maxsize=None)
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
