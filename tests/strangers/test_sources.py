"""A new kind of source is two new files: a copy of the project with these files and no other change works with it."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import load_recipe, parse_recipe
from sft_core.store.store import Store
from steps.download import CONVERSATIONS
from tests.strangers.project_copy import copy_project, run_json, run_python

STRANGERS = Path(__file__).parent
READER = "sft_core/data/sources/sqlite.py"
FILES = {"sqlite_dataset.py": "sft_core/recipe/datasets/kinds/sqlite.py", "sqlite_source.py": READER}
NUM_ROWS = 40
SCRIPT = """
    import json, sys
    from pathlib import Path
    import pyarrow.parquet as pq
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe
    from sft_core.store.store import Store
    from steps import release
    from steps.cli import lineage
    from steps.report_prompts import count_report_prompts
    from steps.download import CONVERSATIONS

    job = json.loads(sys.argv[1])
    recipe = parse_recipe(job["recipe"])
    pinned, store = pin(recipe), Store(job["recipe"]["runtime"]["store"])
    codes = lambda: {
        source: CONVERSATIONS.code(CONVERSATIONS.modules(pinned, {"source": source})) for source in recipe.sources
    }
    counts = count_report_prompts(store, pinned)
    refs = {source: store.ensure(CONVERSATIONS, pinned, source=source) for source in recipe.sources}
    ref = refs["chats"]
    manifest = store.manifest(ref)
    before = codes()
    reader = Path(job["reader"])
    reader.write_text(reader.read_text() + "\\nCHANGED = True\\n")
    print(json.dumps({
        "refs": {source: str(ref) for source, ref in refs.items()},
        "pins": pinned.pins["sources"],
        "section": manifest["identity"]["section"],
        "counts": manifest["counts"],
        "rows": pq.read_table(store.path(ref) / "conversations.parquet").to_pylist(),
        "report_prompts": counts,
        "counted_again": count_report_prompts(store, pinned),
        "origin": lineage._origins(store, ref, manifest),
        "released": release._source(pinned, "chats"),
        "shown": release.shown_recipe(pinned)["dataset_mixture"]["datasets"],
        "changed_code": [source for source, code in codes().items() if code != before[source]],
    }))
"""
FAULTY = """
    import json, sys
    from sft_core.recipe.parse import parse_recipe

    recipe, messages = json.loads(sys.argv[1]), []
    for dataset in [{}, {"sqlite": "a", "path": "b"}, {"path": "b", "query": "c"}, {"sqlite": "a", "split": "c"}]:
        recipe["dataset_mixture"]["datasets"] = [dataset]
        try:
            parse_recipe(recipe)
        except ValueError as error:
            messages.append(str(error))
    print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the two files, and none of its own changed."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    for name, place in FILES.items():
        assert not (folder / place).exists()
        shutil.copy(STRANGERS / name, folder / place)
    return folder


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "chats.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE chats (prompt TEXT, completion TEXT, year INT)")
        rows = [(f"question {number}", f"answer {number}", 2 * number) for number in range(NUM_ROWS)]
        connection.executemany("INSERT INTO chats VALUES (?, ?, ?)", [*rows, ("no answer", None, 1)])
    return path


def with_database(recipe: dict[str, Any], database: Path) -> dict[str, Any]:
    recipe["dataset_mixture"] |= {
        "datasets": [
            recipe["dataset_mixture"]["datasets"][0],
            {"sqlite": str(database), "query": "SELECT * FROM chats ORDER BY year", "num_rows": 9},
        ],
        "report_share": 0.5,
    }
    recipe["evaluation"] = {"tasks": ["chats"], "min_report_rows": 1}
    return recipe


@pytest.mark.slow
def test_source_kind_in_two_new_files_is_pinned_downloaded_counted_and_traced(
    project: Path, small_recipe: dict[str, Any], database: Path
):
    files_alone = pin(parse_recipe(small_recipe))
    files_ref = Store(small_recipe["runtime"]["store"]).locate(CONVERSATIONS, files_alone, {"source": "copy_no_think"})
    result = run_json(
        project, SCRIPT, {"recipe": with_database(small_recipe, database), "reader": str(project / READER)}
    )

    rows = [json.loads(row["conversation"]) for row in result["rows"]]
    assert [row["messages"][0]["content"] for row in rows] == [f"question {number}" for number in range(NUM_ROWS)]
    assert [row["where"] for row in result["rows"]][:2] == ["row 0", "row 2"], "the row without an answer is row 1"
    assert result["counts"]["rows"] == NUM_ROWS + 1 and result["counts"]["conversations"] == NUM_ROWS
    query, digest = "SELECT * FROM chats ORDER BY year", result["pins"]["chats"]
    assert result["section"] == {
        **{"query": query, "pin": digest, "columns": None, "format": "auto"},
        **{"limit": 60, "max_rejected_share": 0.05},
    }
    assert result["report_prompts"] == result["counted_again"] and 5 < result["report_prompts"]["chats"] < NUM_ROWS - 5
    assert result["origin"] == {"source": {"query": query, "sha256": digest}}
    assert result["released"] == {
        **{"name": "chats", "phase": "tuned", "hub_id": None, "config": None, "split": None, "files": ["chats.sqlite"]},
        **{"licence": None, "revision": digest},
    }
    assert str(database.parent) not in json.dumps(result["shown"])
    assert result["shown"][1]["sqlite"] == "chats.sqlite"
    # The other kinds know nothing of it: what they downloaded stays what it is, whatever its reader's code.
    assert result["refs"]["copy_no_think"] == str(files_ref.ref)
    assert result["changed_code"] == ["chats"]


def test_source_kind_in_two_new_files_is_named_in_messages(project: Path, small_recipe: dict[str, Any]):
    none = "give either id (a hub dataset), path (local files) or sqlite (a query of an SQLite database)"
    assert run_json(project, FAULTY, small_recipe) == [
        f"dataset_mixture.datasets[0]: {none}",
        f"dataset_mixture.datasets[0]: {none}",
        "dataset_mixture.datasets[0].query: a dataset with path has no such key, only one with sqlite has; remove it",
        "dataset_mixture.datasets[0].split: a dataset with sqlite has no such key, only one with id has; remove it",
    ]


@pytest.mark.slow
def test_source_kind_in_two_new_files_is_known_to_the_commands(
    project: Path, small_recipe: dict[str, Any], database: Path, tmp_path: Path, save_recipe
):
    command = "from steps.cli.main import main; main()"
    output = tmp_path / "mine.yaml"
    run_python(project, command, "init", "--model", "org/model", "--data", database, "--output", output)
    text = output.read_text()
    assert f"- sqlite: {json.dumps(str(database))}" in text
    assert "report_share: 0.3 " in text, f"of {NUM_ROWS} prompts more are held out than the least, 0.05"
    with pytest.raises(ValueError, match=r"datasets\[0\].sqlite: unknown key"):
        load_recipe(output)  # the project itself does not know it
    planned = run_python(project, command, "plan", save_recipe(with_database(small_recipe, database)))
    (line,) = [line for line in planned.splitlines() if "conversations" in line and "chats" in line]
    assert "build" in line
