"""What a stranger adds, a metric for one, is one new file in a copy of the project: everything that meets its kind then
knows it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from sft_core.evaluate.rows import read_rows
from sft_core.report.model_card import interval
from tests.train.tiny import ROOT, SOURCES, tiny_recipe


class ProjectCopy:
    """The project in a folder of the test. Its commands run there, on the copied code."""

    def __init__(self, folder: Path):
        self.folder = folder
        for package in ("flows", "steps", "sft_core", "configs"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))

    def add_file(self, name: str, text: str) -> None:
        path = self.folder / name
        assert not path.exists(), "a stranger's file is new"
        path.write_text(text)

    def sft(self, *arguments: str, succeeds: bool = True) -> str:
        """What `sft` prints, errors included."""
        return self._output(["-m", "steps.cli.main", *arguments], succeeds)

    def run_code(self, code: str, *arguments: str) -> Any:
        """The JSON that the code prints in its last line."""
        where = f"import sft_core; assert sft_core.__file__.startswith({str(self.folder)!r})\n"
        return json.loads(self._output(["-c", where + code, *arguments], True).splitlines()[-1])

    def _output(self, arguments: list[str], succeeds: bool) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder), "TQDM_DISABLE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert (done.returncode == 0) is succeeds, done.stdout
        return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> ProjectCopy:
    return ProjectCopy(tmp_path / "project")


METRIC = '''"""The metric `letters`: how many of the wanted letters an output has."""

from __future__ import annotations

from sft_core.evaluate.metrics.metric import Metric


class Letters(Metric):
    """The share of the answer's letters that are in the output."""

    name = "letters"
    is_share = True

    def score(self, output: str, wanted: str) -> float:
        return len({*wanted} & {*output}) / len({*wanted})
'''
RELEASE = """
import json, sys
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import load_recipe
from sft_core.store.store import Store
from steps.evaluate import EVALUATED
from steps.release import RELEASED
from steps.report import REPORT, summary

recipe = load_recipe(sys.argv[1])
pinned, store = pin(recipe), Store(recipe.runtime.store)
released = store.ensure(RELEASED, pinned)
counts = store.manifest(store.ensure(REPORT, pinned))["counts"]
evaluated = store.path(store.ensure(EVALUATED, pinned, model="tuned", task=sys.argv[2]))
print(json.dumps({
    "table": summary(counts["scores"], counts["thinking"], "here"),
    "evaluated": str(evaluated),
    "card": (store.path(released) / "model" / "README.md").read_text(),
}))
"""


@pytest.mark.long
def test_metric_that_is_one_new_file_is_planned_scores_rows_and_is_in_the_table_and_the_card(
    project: ProjectCopy, tmp_path: Path
) -> None:
    task = SOURCES[0]
    data = tiny_recipe(
        training={"max_steps": 2},
        evaluation={"max_rows": 6, "max_new_tokens": 16, "metric_by_task": {task: "letters"}},
        runtime={"store": str(tmp_path / "store")},
    )
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(data))
    refused = project.sft("plan", str(recipe), succeeds=False)
    assert f"evaluation.metric_by_task.{task}: found 'letters'; it is no metric" in refused
    project.add_file("sft_core/evaluate/metrics/letters.py", METRIC)

    misspelt = project.sft("plan", str(recipe), "--set", f"evaluation.metric_by_task.{task}=leters", succeeds=False)
    assert "did you mean 'letters'?" in misspelt
    planned = json.loads(project.sft("plan", str(recipe), "--json"))
    assert {row["name"] for row in planned if row["stage"] == "evaluated"} >= {f"base,{task}", f"tuned,{task}"}

    released = project.run_code(RELEASE, str(recipe), task)
    rows = read_rows(Path(released["evaluated"])).to_pylist()
    shares = [len({*row["answer"]} & {*row["outputs"][0]}) / len({*row["answer"]}) for row in rows]
    assert [row["score"] for row in rows] == shares and len(rows) == 6
    assert any(0 < share < 1 for share in shares), "outputs without a wanted letter show nothing"
    (line,) = [line for line in released["table"].splitlines() if line.startswith(task)]
    assert "letters" in line.split()
    (result,) = [result for result in ModelCard(released["card"]).data.eval_results if result.metric_type == "letters"]
    low, high = interval(result.metric_value, 0.0, 6, is_share=True)
    bounds = (result.metric_args["low_95"], result.metric_args["high_95"])
    assert bounds == pytest.approx((low, high), abs=1e-5), "the class says that it is a share, so it is Wilson's"


LOADING = """
import json
from sft_core.evaluate.metrics.registry import metric_classes

try:
    print(json.dumps([*metric_classes()]))
except TypeError as error:
    print(json.dumps(str(error)))
"""


def test_metric_that_states_no_fact_or_takes_anothers_name_is_named(project: ProjectCopy) -> None:
    assert "letters" not in project.run_code(LOADING)
    file = project.folder / "sft_core" / "evaluate" / "metrics" / "letters.py"
    for text, message in (
        (METRIC.replace("    is_share = True\n", ""), "sft_core.evaluate.metrics.letters.Letters: states no is_share"),
        (METRIC.replace('    name = "letters"\n', ""), "sft_core.evaluate.metrics.letters.Letters: states no name"),
        (METRIC.replace('"letters"', '"choice"'), "sft_core.evaluate.metrics.choice has a metric choice, too"),
    ):
        file.write_text(text)
        assert message in project.run_code(LOADING)
    file.write_text(METRIC)
    assert "letters" in project.run_code(LOADING)
