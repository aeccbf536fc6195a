"""The layers, read off the source: imports run one way, heavy ones stay where they are used, names say something."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for package in ("flows", "steps", "sft_core") for path in (ROOT / package).rglob("*.py"))
# Lower may not import higher. pins resolves what data reads, so it stands above data.
RANKS = {
    "sft_core.recipe": 0,
    "sft_core.datasets": 0,
    "sft_core.digests": 0,
    "sft_core.lifetime": 0,
    "sft_core.links": 0,
    "sft_core.local_files": 0,
    "sft_core.measuring": 0,
    "sft_core.rank_strategies": 0,
    "sft_core.search_settings": 0,
    "sft_core.sections": 0,
    "sft_core.store": 0,
    "sft_core.wording": 0,
    "sft_core.report": 0,
    "sft_core.rounds": 0,
    "sft_core.data": 1,
    "sft_core.harness_index": 2,
    "sft_core.harness_tasks": 2,
    "sft_core.pins": 2,
    "sft_core.train": 3,
    "sft_core.evaluate": 4,
    "sft_core.search": 5,
    "sft_core.release": 5,
    "steps": 6,
    "flows": 7,
}
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "metaflow", "huggingface_hub"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, *, late: bool, types: bool = False) -> Iterator[str]:
    """Names that the code imports when it runs; inside a function only when `late`, for types alone when `types`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, late=late, types=types)


def rank(module: str) -> int | None:
    return next((rank for layer, rank in RANKS.items() if f"{module}.".startswith(f"{layer}.")), None)


def top(module: str) -> str:
    """The module or package right below the project's package."""
    return ".".join(module.split(".")[:2])


def found(*, late: bool) -> list[tuple[str, str]]:
    """(module, what it imports) over the whole project."""
    return [(name_of(p), name) for p in FILES for name in imports(ast.parse(p.read_text()), late=late)]


def test_every_module_has_a_layer():
    modules = {name_of(path) for path in FILES} - {"sft_core"}
    assert len(modules) > 30
    assert [module for module in sorted(modules) if rank(module) is None] == []


def test_imports_run_one_way():
    pairs = [(a, b) for a, b in found(late=True) if b.split(".")[0] in ("flows", "steps", "sft_core")]
    assert len(pairs) > 50
    wrong = [f"{a} imports {b}" for a, b in pairs if (rank(b) or 0) > (rank(a) or 0)]
    assert wrong == []


def named_in_strings(tree: ast.AST) -> Iterator[str]:
    """Names of the project's modules in strings. A docstring may point a reader upwards."""
    nodes = list(ast.walk(tree))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from re.findall(r"\b(?:flows|steps|sft_core)(?:\.\w+)+", node.value)


def test_no_string_names_a_module_of_a_higher_layer():
    """A module that another one knows by its name alone is as much above it as one that it imports."""
    pairs = [(name_of(p), name) for p in FILES for name in named_in_strings(ast.parse(p.read_text()))]
    assert ("sft_core.train.launch", "sft_core.train.merge") in pairs
    assert ("steps.train", "sft_core.search.main") in pairs
    wrong = [f"{a} names {b}" for a, b in pairs if (rank(b) or 0) > (rank(a) or 0)]
    assert wrong == []


def test_report_sees_plain_numbers_only():
    pairs = [(a, b) for a, b in found(late=True) if a.startswith("sft_core.report")]
    assert len(pairs) > 0
    assert [f"{a} imports {b}" for a, b in pairs if b.startswith(("sft_core", "steps")) and "report" not in b] == []


def test_store_knows_the_recipe_by_its_types_only():
    store = [path for path in FILES if path.parent.name == "store"]
    assert len(store) > 5
    names = {name for path in store for name in imports(ast.parse(path.read_text()), late=True)}
    own = ("sft_core.store.", "sft_core.digests.")
    assert [name for name in sorted(names) if name.startswith(("sft_core", "steps")) and not name.startswith(own)] == []
    typed = {name for path in store for name in imports(ast.parse(path.read_text()), late=True, types=True)} - names
    other = {name for name in typed if not name.startswith(own)}
    assert other == {"sft_core.recipe.Recipe", "sft_core.sections.Runtime"}
    assert "sft_core.store.remote.Remote" not in {b for _, b in found(late=False)}  # a folder store loads no fsspec


def test_store_has_no_circle_of_imports_not_even_for_types():
    modules = {name_of(path): path for path in FILES if path.parent.name == "store" or path.stem == "digests"}
    graph = {
        module: {name.rpartition(".")[0] for name in imports(ast.parse(path.read_text()), late=True, types=True)}
        & modules.keys()
        for module, path in modules.items()
    }
    assert sum(map(len, graph.values())) > 10
    assert [*graphlib.TopologicalSorter(graph).static_order()][-1] == "sft_core.store.store"


def test_recipe_knows_what_stands_at_the_bottom_only():
    names = ("recipe", "sections", "measuring", "wording", "datasets", "local_files", "rank_strategies", "rounds")
    bottom = {f"sft_core.{name}" for name in (*names, "search_settings")}
    pairs = [(a, b) for a, b in found(late=True) if top(a) in bottom]
    known = {top(b) for _, b in pairs if b.startswith("sft_core")}
    assert known == bottom - {"sft_core.recipe"}


def test_metaflow_is_imported_by_the_flow_and_in_steps_functions_only():
    users = {a for a, b in found(late=True) if b.split(".")[0] == "metaflow"}
    assert "flows.sft_flow" in users and "steps.cards" in users
    assert [name for name in sorted(users) if name.split(".")[0] not in ("flows", "steps")] == []
    assert {a for a, b in found(late=False) if b.split(".")[0] == "metaflow"} == {"flows.sft_flow"}


def test_torch_is_imported_in_train_and_evaluate_only():
    users = {a for a, b in found(late=True) if b.split(".")[0] in ("torch", "trl", "peft", "accelerate")}
    assert len(users) > 3
    assert [name for name in sorted(users) if not name.startswith(("sft_core.train.", "sft_core.evaluate."))] == []


def test_heavy_libraries_elsewhere_are_imported_where_they_are_used():
    pairs = [(a, b) for a, b in found(late=False) if b.split(".")[0] in HEAVY]
    assert len(pairs) > 3
    allowed = ("sft_core.train.", "sft_core.evaluate.", "flows.")
    assert [f"{a} imports {b}" for a, b in pairs if not a.startswith(allowed)] == []
    late = {a for a, b in found(late=True) if b.split(".")[0] == "transformers" and "train" not in a}
    assert late <= {"sft_core.data.tokenizer", *(a for a, _ in pairs)}


@pytest.mark.parametrize("name", ["utils", "util", "helpers", "common", "base", "misc", "core"])
def test_no_module_has_a_name_that_says_nothing(name: str):
    assert len(FILES) > 30
    assert [str(path) for path in FILES if path.stem == name or path.parent.name == name] == []


def calls_print(path: Path) -> list[int]:
    nodes = ast.walk(ast.parse(path.read_text()))
    calls = (node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    return [call.lineno for call in calls if call.func.id == "print"]


def test_print_only_the_log_line_of_training():
    lines = {name_of(path): found for path in FILES if (found := calls_print(path))}
    assert "sft_core.train.callbacks" in lines
    core = [name for name in lines if name.startswith("sft_core.") and not name.startswith("sft_core.train.")]
    assert core == [] and not [name for name in lines if name.startswith("steps.")]


def test_every_module_states_its_purpose():
    silent = [name_of(p) for p in FILES if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))]
    assert silent == []
