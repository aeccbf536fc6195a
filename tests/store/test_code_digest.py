"""Code identity: what is executed moves the digest, what is only read by people does not."""

import ast
import importlib.metadata
from pathlib import Path

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store import code_digest as code
from sft_core.store.stage import Stage
from steps.download import CONVERSATIONS
from steps.plan import ORDER

FILES = {
    "sft_core/__init__.py": "",
    "sft_core/builder.py": '''"""Builds."""
from __future__ import annotations
from typing import TYPE_CHECKING
from sft_core.direct import first
if TYPE_CHECKING:
    from sft_core.types_only import T


def build(rows: T):
    """A docstring."""
    # a comment
    from sft_core.late import late
    return first(rows), late(1)
''',
    "sft_core/direct.py": "import json\nfrom . import transitive\n\n\ndef first(rows):\n    return transitive.ONE\n",
    "sft_core/transitive.py": "ONE = 1\n",
    "sft_core/late.py": "import sft_core.later\n\n\ndef late(x):\n    return x\n",
    "sft_core/later.py": "TWO = 2\n",
    "sft_core/types_only.py": "class T: ...\n",
    "sft_core/unrelated.py": "THREE = 3\n",
}
DATA_BUILDERS = (
    *("sources.read", "rendering.build", "tokens.build"),
    *("overlap.signatures", "overlap.deduplication", "overlap.report_prompts", "overlap.decontamination"),
    *("mixing.mixture", "packing.windows", "packing.plan"),
)
SHAPE_BYTES = {"jinja2", "tokenizers", "datasketch", "xxhash"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_closure_top_late_and_relative_imports_are_in_it(project: Path):
    expected = ["sft_core", *(f"sft_core.{name}" for name in ("builder", "direct", "late", "later", "transitive"))]
    assert code.closure("sft_core.builder") == expected


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("builder", '"""Builds."""', '"""Makes\nmore."""'),
        ("builder", '    """A docstring."""\n', ""),
        ("builder", "    # a comment\n", "\n\n    # another\n"),
        ("builder", "return first(rows), late(1)", "return (\n        first( rows ),\n        late(1),\n    )"),
        ("transitive", "ONE = 1", "# one\n\n\nONE   =   (1)  # one"),
        ("later", "TWO = 2\n", "TWO = 2\n\n\n\n"),
        ("types_only", "class T: ...", "class T:\n    x: int = 1"),
        ("unrelated", "THREE = 3", "THREE = 4"),
    ],
)
def test_digest_what_runs_nothing_changes_nothing(project: Path, file: str, old: str, new: str):
    before = code.code_digest("sft_core.builder")
    replace(project / "sft_core" / f"{file}.py", old, new)
    assert code.code_digest("sft_core.builder") == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("builder", "late(1)", "late(2)"),
        ("builder", "from sft_core.direct import first\n", "from sft_core.unrelated import THREE as first\n"),
        ("direct", "return transitive.ONE", 'return "a string" and transitive.ONE'),
        ("transitive", "ONE = 1", "ONE = 2"),
        ("late", "return x", "return -x"),
        ("later", "TWO = 2", 'TWO = "2"'),
    ],
)
def test_digest_a_changed_statement_changes_it(project: Path, file: str, old: str, new: str):
    before = code.code_digest("sft_core.builder")
    replace(project / "sft_core" / f"{file}.py", old, new)
    assert code.code_digest("sft_core.builder") != before


def test_digest_a_package_that_runs_on_import_counts(project: Path):
    (project / "sft_core" / "alone.py").write_text("X = 1\n")
    before = code.code_digest("sft_core.alone")
    (project / "sft_core" / "__init__.py").write_text("import warnings\n")
    assert code.code_digest("sft_core.alone") != before


def test_digest_imports_of_the_else_branch_of_type_checking_count(project: Path):
    with (project / "sft_core" / "later.py").open("a") as file:
        file.write("if TYPE_CHECKING:\n    import sft_core.types_only\nelse:\n    import sft_core.unrelated\n")
    closure = code.closure("sft_core.builder")
    assert "sft_core.unrelated" in closure and "sft_core.types_only" not in closure


@pytest.mark.parametrize(
    "text",
    [
        '__import__("sft_core.unrelated")',
        'import importlib\nimportlib.import_module("sft_core.unrelated")',
        'import importlib as i\ni.import_module("sft_core.unrelated")',
        'from importlib import import_module\nimport_module("sft_core.unrelated")',
        'from importlib import import_module as load\nload("sft_core.unrelated")',
        'import runpy\ndef f():\n    runpy.run_module("sft_core.unrelated")',
        'load = __import__\nload("sft_core.unrelated")',
    ],
)
def test_digest_a_dynamic_import_is_refused(project: Path, text: str):
    (project / "sft_core" / "later.py").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"sft_core\.later, line \d: a dynamic import in a builder's code"):
        code.code_digest("sft_core.builder")


def test_digest_unknown_module_is_refused(project: Path):
    with pytest.raises(ValueError, match=r"sft_core\.none: no such module"):
        code.code_digest("sft_core.none")


def test_digest_library_names_and_versions_count(project: Path, monkeypatch: pytest.MonkeyPatch):
    plain = code.code_digest("sft_core.builder")
    with_jinja = code.code_digest("sft_core.builder", ("jinja2",))
    assert len({plain, with_jinja, code.code_digest("sft_core.builder", ("tokenizers",))}) == 3
    both = code.code_digest("sft_core.builder", ("jinja2", "tokenizers"))
    assert both == code.code_digest("sft_core.builder", ("tokenizers", "jinja2"))

    monkeypatch.setattr(importlib.metadata, "version", lambda library: "0.0.0")
    assert code.code_digest("sft_core.builder", ("jinja2",)) != with_jinja
    assert code.code_digest("sft_core.builder") == plain


# Policies over the project itself


@pytest.mark.parametrize("name", DATA_BUILDERS)
def test_data_builder_closure_holds_no_training_and_no_evaluation(name: str):
    closure = code.closure(f"sft_core.data.{name}")
    assert f"sft_core.data.{name}" in closure and len(closure) > 3
    assert {module.split(".")[1] for module in closure if "." in module} <= {
        "data",
        "die_with_parent",
        "counts",
        "parquet",
    }
    assert len(code.code_digest(f"sft_core.data.{name}")) == 64


def test_source_reader_is_part_of_the_code_of_its_own_sources(small_recipe):
    hub = {"id": "org/chat", "name": "of_hub", "revision": "a" * 40}
    small_recipe["dataset_mixture"]["datasets"].append(hub)
    pinned = pin(parse_recipe(small_recipe))
    readers = {"copy_no_think": "sft_core.data.sources.files", "of_hub": "sft_core.data.sources.hub"}
    digests = {code.code_digest("sft_core.data.sources.read")}
    for source, reader in readers.items():
        assert CONVERSATIONS.modules(pinned, {"source": source}) == (reader,)
        closure = code.closure(reader)
        assert {module.split(".")[1] for module in closure if "." in module} <= {
            "data",
            "local_files",
            "counts",
            "parquet",
        }
        digests.add(CONVERSATIONS.code((reader,)))
    assert len(digests) == 3
    same_kind = CONVERSATIONS.modules(pinned, {"source": "checksum_think"})
    assert same_kind == CONVERSATIONS.modules(pinned, {"source": "copy_no_think"})


def data_stages() -> tuple[Stage, ...]:
    from steps import decontaminate, deduplicate, download, mix, pack, render, tokenize, windows

    return (
        *(download.CONVERSATIONS, render.RENDERED, tokenize.TOKENS),
        *(deduplicate.SIGNATURES, deduplicate.DUPLICATES),
        *(decontaminate.REPORT_PROMPTS, decontaminate.CONTAMINATION),
        *(mix.MIXTURE, windows.WINDOWS, pack.PACKED),
    )


def test_store_is_in_no_key():
    """A package runs with each of its modules: a builder that imports one would be built again for a change in any."""
    from steps import release, report, train

    stages = (*data_stages(), train.CHECKPOINT, report.REPORT, release.RELEASED)
    closures = {stage.name: code.closure(stage.build.__module__) for stage in stages}
    assert "sft_core.links" in closures["checkpoint"] and "sft_core.links" in closures["release"]
    assert [name for name, modules in closures.items() if any("sft_core.store" in module for module in modules)] == []


def test_data_builders_are_those_of_the_stages():
    stages = data_stages()
    assert tuple(stage.build.__module__ for stage in stages) == tuple(f"sft_core.data.{n}" for n in DATA_BUILDERS)
    assert [stage.name for stage in stages] == ORDER[: len(stages)]
    assert all(stage.version is None for stage in stages)


def test_data_builder_libraries_that_shape_bytes_are_counted():
    """A stage whose code imports one of them, at the top or late, states it."""
    found = {}
    for stage in data_stages():
        trees = [ast.parse(path.read_text()) for m in code.closure(stage.build.__module__) if (path := code._path(m))]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        found[stage.name] = (imported & SHAPE_BYTES, set(stage.libraries))
    assert found["rendered"][0] and found["tokens"][0] and found["signatures"][0] == {"datasketch", "xxhash"}
    assert found["conversations"] == found["mixture"] == found["packed"] == (set(), set())
    assert [name for name, (imported, stated) in found.items() if not imported <= stated] == []
