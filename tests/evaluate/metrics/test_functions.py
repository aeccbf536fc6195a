"""A user's function as a metric: it is checked before work, and its code is part of the identity."""

import sys
from pathlib import Path
from typing import Any

import pytest

from sft_core.evaluate.metrics.metric import Question
from sft_core.evaluate.metrics.registry import check_metrics, load_metric, metric_identity
from sft_core.recipe.evaluation import Evaluation
from sft_core.recipe.parse import parse_recipe
from sft_core.store.code_digest import user_code_digest
from tests.train.tiny import tiny_recipe

TASK = "copy_no_think"
FILES = {
    "mine_pkg/__init__.py": "",
    "mine_pkg/scores.py": '''"""Scores."""
from mine_pkg.words import count
import mine_beside


def few_words(output, answer, row):
    return 1.0 if count(output) <= len(row["messages"]) else 0.5 * mine_beside.ONE


def two(output, answer): ...
def percent(output, answer, row): return 100.0
def broken(output, answer, row): raise KeyError("x")
NUMBER = 3
''',
    "mine_pkg/words.py": "def count(text):\n    return len(text.split())\n",
    "mine_pkg/unrelated.py": "ONE = 1\n",
    "mine_beside.py": "ONE = 1\n",
    "mine_faulty.py": "raise RuntimeError('no licence')\n",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("mine_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def evaluation(function: str) -> Evaluation:
    return parse_recipe(tiny_recipe(evaluation={"metric_by_task": {TASK: function}})).evaluation


def test_function_is_given_output_answer_and_row(project: Path) -> None:
    metric = load_metric({"name": "mine_pkg.scores:few_words"})
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    asked = metric.ask(Question("7", None, "", row))
    assert asked is not None and asked.wanted == (None, {**row, "row_id": "7"})
    assert [metric.score(output, asked.wanted) for output in ("a b", "a b c")] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("mine_none:f", r"metric_by_task\.copy_no_think: mine_none: no such module on Python's path"),
        ("mine_pkg.none:f", r"metric_by_task\.copy_no_think: mine_pkg\.none: no such module"),
        ("mine_faulty:f", r"mine_faulty cannot be imported \(RuntimeError: no licence\)"),
        ("mine_pkg.scores:nothing", r"found nothing as 'nothing' in mine_pkg\.scores; a metric is a function"),
        ("mine_pkg.scores:NUMBER", r"found int as 'NUMBER' in mine_pkg\.scores"),
        ("mine_pkg.scores:two", r"is called as function\(output, answer, row\): too many positional arguments"),
    ],
)
def test_function_that_cannot_be_called_is_refused_before_work(project: Path, function: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_metrics(evaluation(function), [TASK])


def test_function_score_that_is_no_share_is_refused(project: Path) -> None:
    metric = load_metric({"name": "mine_pkg.scores:percent"})
    with pytest.raises(ValueError, match=r"mine_pkg\.scores:percent gave 100\.0; a score is a number of 0 to 1"):
        metric.score("x", (None, {}))


@pytest.mark.parametrize(
    ("edited", "text", "counts"),
    [
        ("mine_pkg/scores.py", "\nONE = 1\n", True),
        ("mine_pkg/words.py", "\nONE = 1\n", True),
        ("mine_beside.py", "\nTWO = 1\n", True),
        ("mine_pkg/__init__.py", "ONE = 1\n", True),
        ("mine_pkg/scores.py", "\n# why\n", False),
        ("mine_pkg/unrelated.py", "\nTWO = 2\n", False),
    ],
)
def test_function_code_and_what_it_imports_are_its_identity(
    project: Path, edited: str, text: str, counts: bool
) -> None:
    found = evaluation("mine_pkg.scores:few_words")
    before = metric_identity(found, TASK)
    assert before == {"name": "mine_pkg.scores:few_words", "code": user_code_digest("mine_pkg.scores")}
    with (project / edited).open("a") as file:
        file.write(text)
    assert (metric_identity(found, TASK) != before) is counts


def test_function_of_an_installed_package_follows_its_own_package_alone() -> None:
    assert len(user_code_digest("json.decoder")) == len(user_code_digest("click.testing")) == 64
