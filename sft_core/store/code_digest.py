"""Code identity: a digest of the code that a builder executes. Comments, docstrings and formatting do not count.

The closure of a builder is its module and the project modules that it imports, directly or through others, at the top
or inside a function. Imports under `if TYPE_CHECKING:` execute nothing and do not count. An import whose target the
source does not name is refused: the digest would miss its code.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT_PACKAGES = ("steps", "sft_core")
ROOT = Path(__file__).resolve().parents[2]


class Tree(NamedTuple):
    """The folder whose code counts."""

    root: Path
    packages: tuple[str, ...] | None  # None: all below the root


def code_digest(module: str, libraries: tuple[str, ...] = (), *, others: tuple[str, ...] = ()) -> str:
    """SHA-256 (hex) of the closure of `module` and of the versions of libraries that shape its bytes.

    others: modules whose closures count too, though `module` does not import them. Raises ValueError where a module of
    a closure imports dynamically.
    """
    digest = hashlib.sha256()
    for name in sorted({name for root in (module, *others) for name in closure(root)}):
        digest.update(f"{name}\0{_read(name).executed}\0".encode())
    for library in sorted(libraries):
        digest.update(f"{library}=={importlib.metadata.version(library)}\0".encode())
    return digest.hexdigest()


def module_digests(*modules: str) -> dict[str, str]:
    """A short digest of each module in the closures of `modules`, by name.

    Where a module imports dynamically, all modules of its package and of the packages that it imports count. Modules of
    others than the project are left out.
    """
    roots = [module for module in modules if _path(module) is not None]
    names = sorted({name for root in roots for name in closure(root, follow_packages=True)})
    return {name: hashlib.sha256(_read(name).executed.encode()).hexdigest()[:12] for name in names}


def user_code_digest(module: str) -> str:
    """SHA-256 (hex) of a user's module and of the modules that it imports from the same folder.

    Of an installed module only its package counts. Raises ValueError when Python's path has no such module, and as
    `code_digest` does.
    """
    top = module.split(".")[0]
    spec = importlib.util.find_spec(top)
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec is not None else []
    place = next((Path(place) for place in places if place and Path(place).exists()), None)
    if place is None:
        raise ValueError(f"{module}: no such module on Python's path; install it, or put its folder into PYTHONPATH")
    root = place.parent.parent if place.name == "__init__.py" else place.parent
    is_installed = root.name in ("site-packages", "dist-packages") or str(root) == sysconfig.get_path("stdlib")
    tree = Tree(root, (top,) if is_installed else None)
    digest = hashlib.sha256()
    for name in closure(module, tree):
        digest.update(f"{name}\0{_read(name, tree).executed}\0".encode())
    return digest.hexdigest()


def closure(module: str, tree: Tree | None = None, *, follow_packages: bool = False) -> list[str]:
    """The modules of the project, or of another tree, that `module` can execute, itself included, sorted by name.

    follow_packages: takes whole packages where a module imports dynamically, in place of a ValueError.
    """
    modules: set[str] = set()
    waiting = [module, *(name for name in _with_parents(module) if _path(name, tree))]
    while waiting:
        name = waiting.pop()
        if name not in modules:
            modules.add(name)
            code = _read(name, tree)
            waiting.extend(code.imports)
            if code.dynamic is not None:
                if not follow_packages:
                    where = f"{name}, line {code.dynamic}"
                    raise ValueError(f"{where}: a dynamic import in a builder's code cannot be tracked")
                waiting.extend(_of_packages(name, code.imports, tree))
    return sorted(modules)


def _of_packages(module: str, imports: frozenset[str], tree: Tree | None) -> list[str]:
    """The modules of the module's own package, and of the packages that it imports."""
    package = module.rpartition(".")[0]
    packages = {name for name in imports if not package.startswith(f"{name}.")} | {package}
    files = [(name, path) for name in packages if (path := _path(name, tree)) and path.name == "__init__.py"]
    return [f"{name}.{file.stem}" for name, path in files for file in path.parent.glob("[!_]*.py")]


class _Module(NamedTuple):
    executed: str  # the syntax tree without positions, comments and docstrings
    imports: frozenset[str]
    dynamic: int | None  # the line of a dynamic import


def _read(module: str, tree: Tree | None = None) -> _Module:
    path = _path(module, tree)
    if path is None:
        raise ValueError(f"{module}: no such module")
    stat = path.stat()
    return _parse(module, path, stat.st_mtime_ns, stat.st_size, tree or Tree(ROOT, PROJECT_PACKAGES))


@functools.cache
def _parse(module: str, path: Path, mtime_ns: int, size: int, tree: Tree) -> _Module:
    syntax = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imports = frozenset(_imports(syntax, module, tree, is_package=path.name == "__init__.py"))
    lines = [getattr(node, "lineno", 0) for node in _executed(syntax) if _DYNAMIC.intersection(_names(node))]
    return _Module(ast.dump(_WithoutDocstrings().visit(syntax)), imports, min(lines, default=None))


def _path(module: str, tree: Tree | None = None) -> Path | None:
    """The module's file. It is looked up without importing the package."""
    base = (tree.root if tree else ROOT).joinpath(*module.split("."))
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


def _imports(syntax: ast.Module, module: str, tree: Tree, *, is_package: bool) -> set[str]:
    """Modules of the tree that the module imports, with the packages around them, which run first."""
    names: set[str] = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in _executed(syntax):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
                if node.level
                else [node.module]
            )
            names.update(".".join([*base, alias.name]) for alias in node.names)  # a module, or a name in one
    inside = (name for name in names if tree.packages is None or name.split(".")[0] in tree.packages)
    return {part for name in inside for part in _with_parents(name) if _path(part, tree) is not None}


def _executed(syntax: ast.Module) -> Iterator[ast.AST]:
    """The nodes of a module, without those for types alone."""
    waiting: list[ast.AST] = [syntax]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


_DYNAMIC = frozenset({"__import__", "import_module", "run_module", "run_path"})


def _names(node: ast.AST) -> list[str]:
    """Names that the node itself refers to; of an import the imported name, not the `as` name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
