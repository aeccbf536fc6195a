"""What the import contracts in pyproject.toml cannot say: late imports, names in strings, prints, docstrings, names.

`lint-imports` reads the contracts: layers, and no circles. One test plants faults to see that it does.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for package in ("flows", "steps", "sft_core") for path in (ROOT / package).rglob("*.py"))
CONTRACTS = {
    contract["name"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
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


def rank(module: str) -> int:
    """The higher the number, the higher the layer that the contracts put the module in."""
    package, _, rest = module.partition(".")
    rooms = CONTRACTS["The rooms of the library"]["layers"]
    if package == "sft_core":
        return next(
            (number for number, room in enumerate(reversed(rooms)) if rest.split(".")[0] in room.split(" | ")), 0
        )
    return len(rooms) + ["steps", "flows"].index(package)


def found(*, late: bool) -> list[tuple[str, str]]:
    """(module, what it imports) over the whole project."""
    return [(name_of(p), name) for p in FILES for name in imports(ast.parse(p.read_text()), late=late)]


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("steps/mix.py", "from flows import sft_flow", "The flow stands on the steps, the steps on the library"),
        ("sft_core/train/job.py", "from sft_core.search import job", "The rooms of the library"),
        ("sft_core/report/flags.py", "from sft_core.store import ref", "The rooms of the library"),
        (
            "steps/mix.py",
            "from steps.cards import pieces",
            "The rooms of the steps",
        ),
        ("sft_core/store/ref.py", "from sft_core.store import stage", "No circles"),
        ("sft_core/data/sources/splits.py", "import metaflow", "The library knows no Metaflow"),
    ],
)
def test_contract_finds_a_planted_import_for_types(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for name in ("flows", "steps", "sft_core"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    {line}\n")
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 1 and f"{contract} BROKEN" in done.stdout, done.stdout


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
    assert ("steps.training_job", "sft_core.search.main") in pairs
    wrong = [f"{a} names {b}" for a, b in pairs if rank(b) > rank(a)]
    assert wrong == []


def test_store_knows_the_recipe_by_its_types_only():
    store = [path for path in FILES if path.parent.name == "store"]
    assert len(store) > 5
    names = {name for path in store for name in imports(ast.parse(path.read_text()), late=True)}
    own = ("sft_core.store.", "sft_core.store.digests.")
    assert [name for name in sorted(names) if name.startswith(("sft_core", "steps")) and not name.startswith(own)] == []
    typed = {name for path in store for name in imports(ast.parse(path.read_text()), late=True, types=True)} - names
    other = {name for name in typed if not name.startswith(own)}
    assert other == {"sft_core.recipe.recipe.Recipe", "sft_core.recipe.sections.Runtime"}
    assert "sft_core.store.remote.Remote" not in {b for _, b in found(late=False)}  # a folder store loads no fsspec


@pytest.mark.slow
def test_metaflow_is_imported_by_the_flow_and_in_steps_functions_only():
    users = {a for a, b in found(late=True) if b.split(".")[0] == "metaflow"}
    assert "flows.sft_flow" in users and "steps.cards.pieces" in users
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
    assert late <= {"sft_core.data.tokenizer.tokenizer", *(a for a, _ in pairs)}


@pytest.mark.parametrize("name", ["utils", "util", "helpers", "common", "base", "misc", "core"])
def test_no_module_has_a_name_that_says_nothing(name: str):
    assert len(FILES) > 30
    assert [str(path) for path in FILES if path.stem == name or path.parent.name == name] == []


def names_given(tree: ast.AST) -> Iterator[str]:
    """Names of variables, parameters and functions that the code gives."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef):
            yield node.name


def test_a_name_says_the_kind_of_thing():
    """`refs`, `counts`, `problems`: a reader of `found` has to look up what was found."""
    names = {"found", "one", "told", "seen", "made", "what", "own", "left"}
    vague = [(name_of(p), name) for p in FILES for name in names_given(ast.parse(p.read_text())) if name in names]
    assert vague == []


def test_untyped_dicts_stay_where_json_is_read_or_written():
    """Between modules values have types. A larger number wants a reason; a smaller one is written down here."""
    counts = {name_of(path): path.read_text().count("dict[str, Any]") for path in FILES}
    assert 0 < sum(counts.values()) <= 145
    rooms = ("sft_core.evaluate.", "sft_core.search.", "sft_core.store.")
    assert sum(count for name, count in counts.items() if name.startswith(rooms)) <= 8


def calls_print(path: Path) -> list[int]:
    nodes = ast.walk(ast.parse(path.read_text()))
    calls = (node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    return [call.lineno for call in calls if call.func.id == "print"]


@pytest.mark.slow
def test_print_only_the_log_line_of_training():
    lines = {name_of(path): found for path in FILES if (found := calls_print(path))}
    assert "sft_core.train.callbacks" in lines
    core = [name for name in lines if name.startswith("sft_core.") and not name.startswith("sft_core.train.")]
    assert core == [] and not [name for name in lines if name.startswith("steps.")]


def test_every_module_states_its_purpose():
    silent = [name_of(p) for p in FILES if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))]
    assert silent == []
