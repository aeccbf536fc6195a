"""A task that fails leaves the others' scores, is named at the end, and is evaluated again on a resume."""

from __future__ import annotations

import base64
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import RECIPE, Project, names

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{word}}}}"
doc_to_choice: [x, y]
doc_to_target: 0
process_results: !function functions.{name}
metric_list: [{{metric: acc}}]
"""
FUNCTIONS = """\
import os
import signal
from pathlib import Path

BROKEN = Path({broken!r})


def raises(doc, results):
    if BROKEN.exists():
        raise RuntimeError("the judge is away")
    return {{"acc": float(results[0][0] > results[1][0])}}


def killed(doc, results):
    if BROKEN.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return raises(doc, results)
"""
TASKS = ("raises", "killed")


def recipe_with_tasks(folder: Path, broken: Path) -> dict[str, Any]:
    folder.mkdir()
    (folder / "words.jsonl").write_text("".join(json.dumps({"word": word}) + "\n" for word in ("ab", "cd", "ef")))
    (folder / "functions.py").write_text(FUNCTIONS.format(broken=str(broken)))
    for name in TASKS:
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder))
    recipe = copy.deepcopy(RECIPE)
    del recipe["dataset_mixture"]["datasets"][1:]  # fewer tasks of the flow
    recipe["evaluation"]["lm_eval"] = {"tasks": list(TASKS), "include_path": str(folder)}
    return recipe


def card_data(project: Project) -> list[str]:
    """What the evaluation cards show: a card holds it in base64."""
    pages = project.folder.glob(".metaflow/mf.cards/**/evaluate/**/*.html")
    found = [re.findall(r'"([A-Za-z0-9+/=]{400,})"', page.read_text()) for page in pages]
    assert found
    return [base64.b64decode(data).decode(errors="replace") for held in found for data in held]


@pytest.mark.long
def test_failed_tasks_leave_the_others_scores_and_a_resume_evaluates_them_alone(tmp_path: Path) -> None:
    project, broken = Project(tmp_path), tmp_path / "broken"
    project.write(recipe_with_tasks(tmp_path / "tasks", broken))
    broken.touch()

    output = project.run("run", succeeds=False)
    assert re.search(r"checksum_think .* exact_match ", output)
    assert "2 of the tasks could not be evaluated" in output
    assert re.search(r"lm_eval:raises: the judge is away", output)
    assert re.search(r"lm_eval:killed: its process was killed", output)
    assert "functions.py" in output, "its log has the traceback"
    assert "sft resume" in output
    (card,) = project.store.glob("release/*/model/README.md")
    text = card.read_text()
    assert "**Not scored: lm_eval:raises, lm_eval:killed.**" in text
    assert "| checksum_think | exact match |" in text
    assert sum("the judge is away" in page for page in card_data(project)) == 1, "its card has the traceback"
    pages = [page.read_text() for page in project.folder.glob(".metaflow/mf.cards/**/*.html")]
    assert len(pages) > 5
    assert all("fonts.googleapis" not in page and "Content-Security-Policy" in page for page in pages)
    before = len(project.builds())

    broken.unlink()
    output = project.sft("resume")
    assert "evaluating lm_eval:raises, lm_eval:killed again" in output
    assert all(re.search(rf"lm_eval:{name} .* acc ", output) for name in TASKS)
    again = names(project.builds()[before:])
    assert {name.split()[0] for name in again} == {"harness", "report", "release"}
    assert {name for name in again if name.startswith("harness")} == {
        f"harness {model} {task}" for model in ("base", "tuned") for task in ("raises", "killed")
    }
    cards = [path.read_text() for path in project.store.glob("release/*/model/README.md")]
    assert sorted("Not scored" in text for text in cards) == [False, True]
    assert json.loads(project.sft("scores", "--json"))[-1]["task"] == "lm_eval:killed"
