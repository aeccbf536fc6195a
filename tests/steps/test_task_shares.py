"""Tasks in shares, and a share scored by a process of its own: how often it loads a model, and who fails alone."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps import task_shares
from steps.outcomes import Order, Scoring, orders, outcomes
from steps.scored import MAX_REASON, reasons_of, shortened
from steps.task_shares import dealt, score, shares_of
from steps.train import TRAINED
from tests.evaluate.test_vllm_process import wait_until
from tests.steps.cards.test_pieces import Card
from tests.train.tiny import ROOT, SOURCES, processes_naming, tiny_recipe

pytestmark = pytest.mark.slow

LM_EVAL = {
    "tasks": ["copy_longer"],
    "include_path": str(ROOT / "configs" / "quickstart" / "lm_eval"),
    "limit": 3,
}
TASKS = [*SOURCES, "lm_eval:copy_longer"]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(1, 9))
def test_shares_hold_each_task_once_and_differ_by_one_task_at_most(costs: list[int], num_shares: int) -> None:
    tasks = {f"task {number}": cost for number, cost in enumerate(costs)}
    shares = dealt(tasks, num_shares)
    assert len(shares) == min(num_shares, len(tasks)) and all(shares)
    assert sorted(task for share in shares for task in share) == sorted(tasks)
    assert all(share == [task for task in tasks if task in share] for share in shares), "in the recipe's order"
    totals = [sum(tasks[task] for task in share) for share in shares]
    assert max(totals) - min(totals) <= max(costs)


def test_shares_of_tasks_alike_are_as_long_and_pairs_are_torn_to_and_fro() -> None:
    pairs = [f"{name}_{mode}" for name in "abcdef" for mode in ("no_think", "think")]
    shares = dealt(dict.fromkeys([*pairs, "lm_eval:x", "lm_eval:y"], 256), 2)
    assert [len(share) for share in shares] == [7, 7]
    assert [sum(task.endswith("_no_think") for task in share) for share in shares] == [3, 3]
    assert [sum(task.startswith("lm_eval:") for task in share) for share in shares] == [1, 1]


@pytest.mark.parametrize(
    ("gpus", "at_a_time", "parallel", "num_shares"),
    [
        *[(0, None, 1, 2), (0, "1", 1, 1), (0, "8", 1, 2), (1, None, 1, 1), (4, None, 1, 2), (4, "16", 1, 4)],
        *[(8, "16", 4, 2), (2, "16", 4, 1), (9, "16", 1, 5)],
    ],
)
def test_as_many_shares_as_gpus_that_work_at_a_time(
    monkeypatch: pytest.MonkeyPatch, gpus: int, at_a_time: str | None, parallel: int, num_shares: int
) -> None:
    monkeypatch.setattr(task_shares, "visible_gpus", lambda: list(map(str, range(gpus))))
    monkeypatch.delenv("METAFLOW_RUN_MAX_WORKERS", raising=False)
    if at_a_time is not None:
        monkeypatch.setenv("METAFLOW_RUN_MAX_WORKERS", at_a_time)
    names = ["a", "b", "c", "d", "e"]
    data = tiny_recipe(evaluation={"engine": "vllm"} if parallel > 1 else {})
    data["dataset_mixture"]["datasets"] = [{"name": name, "path": "x.jsonl"} for name in names]
    data["runtime"]["vllm"] = {"tensor_parallel_size": parallel}
    found = shares_of(parse_recipe(data))
    assert len(found) == num_shares and sorted(task for share in found for task in share) == names


def test_on_a_cluster_each_task_is_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFLOW_KUBERNETES_WORKLOAD", "1")
    data = tiny_recipe(evaluation={"lm_eval": LM_EVAL})
    assert shares_of(parse_recipe(data)) == [[task] for task in TASKS]


def test_with_vllm_what_transformers_does_comes_first() -> None:
    pinned = PinnedRecipe(parse_recipe(tiny_recipe(evaluation={"engine": "vllm"})), {})
    scorings = [Scoring(model, task) for model in MODELS for task in ("a", "lm_eval:x", "b")]
    expected = [("lm_eval:x", False), ("a", True), ("b", True), ("a", False), ("b", False)]
    assert orders(pinned, scorings) == [
        Order(Scoring(model, task), is_ahead) for model in MODELS for task, is_ahead in expected
    ]


def test_reasons_are_a_line_each_and_together_what_the_ui_shows() -> None:
    few = shortened({"a": "é" * 1000 + "\nmore", "b": "\n", "c": "its judge is away\nTraceback"})
    assert few == {"a": "é" * (MAX_REASON // 2), "b": "no reason was given", "c": "its judge is away"}
    many = shortened({f"a_task_with_a_rather_long_name_{number}_no_think": "x" * 500 for number in range(25)})
    assert len(many) == 25 and len(pickle.dumps(many)) < 4096
    assert {len(reason) for reason in many.values()} != {MAX_REASON}


class Input:
    """What a join sees of a step's task."""

    def __init__(self, failure: str | None, **artifacts: Any):
        self.failure = failure and Input(None, exception=failure)
        self.__dict__ |= artifacts


def test_reasons_come_from_shares_from_what_they_failed_with_and_from_steps_of_a_task() -> None:
    inputs = [
        Input(None, share=["a"], failures={}),
        Input("not scored: c", share=["b", "c"], failures={"c": "no judge"}),
        Input("no process", share=["d", "e"]),
        Input("killed before it began"),
        Input("the judge is away", task="f"),
        Input(None, task="g", evaluated={}),
    ]
    found = reasons_of(inputs)
    assert {task: found[task] for task in "cdef"} == {
        **{"c": "no judge", "d": "no process", "e": "no process"},
        "f": "the judge is away",
    }
    assert not {"a", "g"} & found.keys()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, PinnedRecipe]:
    """Two sources and a task of lm-eval, trained and not scored."""
    data = tiny_recipe(
        training={"num_train_epochs": 1}, evaluation={"max_rows": 4, "max_new_tokens": 4, "lm_eval": LM_EVAL}
    )
    data["runtime"]["store"] = str(tmp_path_factory.mktemp("store"))
    pinned = pin(parse_recipe(data))
    store = Store(pinned.recipe.runtime.store)
    store.ensure(TRAINED, pinned, round=0)
    return store, pinned


def changed(trained: tuple[Store, PinnedRecipe], **evaluation: Any) -> PinnedRecipe:
    """Another evaluation of the same checkpoint."""
    data = json.loads(trained[1].recipe.model_dump_json(exclude_unset=True))
    data["evaluation"] |= evaluation
    return pin(parse_recipe(data))


def workers(started_by: int) -> set[int]:
    return set(processes_naming("steps.score_worker")) & set(processes_naming(f"\0{started_by}\0"))


def test_share_loads_each_model_once_draws_as_it_goes_and_what_is_there_starts_no_process(
    trained: tuple[Store, PinnedRecipe], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, pinned = trained
    card = Card()
    found = score(store, pinned, TASKS, 0, card)
    log = capfd.readouterr().err
    assert log.count("loaded=") == 2 and log.count("loaded=random weights") == 1, log
    assert list(found.evaluated) == TASKS and found.failures == {}
    stages = [address.split("/")[0] for refs in found.evaluated.values() for address in refs.values()]
    assert stages == ["evaluated"] * 4 + ["harness"] * 2
    assert card.num_refreshes == 6, "before the first score, and after each but the last"
    shown = json.dumps([component.render() for component in card.components])
    places = [shown.index(f"Task {task}") for task in TASKS]
    assert places == sorted(places)
    assert not workers(os.getpid())

    monkeypatch.setattr(task_shares, "outcomes", lambda *args: pytest.fail("a process for what is there"))
    monkeypatch.setattr(task_shares, "visible_gpus", lambda: pytest.fail("nothing is loaded on any"))
    again = Card()
    assert score(store, pinned, TASKS, 0, again).evaluated == found.evaluated
    assert again.num_refreshes == 0 and len(again.components) == len(card.components)


def test_task_that_fails_fails_alone_and_is_not_tried_on_the_tuned_model(
    trained: tuple[Store, PinnedRecipe], capfd: pytest.CaptureFixture[str]
) -> None:
    store, _ = trained
    pinned = changed(trained, metric_by_task={SOURCES[0]: "tool_call"}, max_rows=3)
    card = Card()
    found = score(store, pinned, TASKS, 0, card)
    log = capfd.readouterr().err
    assert list(found.evaluated) == TASKS[1:]
    assert found.failures.keys() == {SOURCES[0]}
    assert "tool_call wants calls" in found.failures[SOURCES[0]]
    assert log.count("status=failed") == 1 and "Traceback" in log, "the tuned model is not tried"
    assert log.count("loaded=") == 2, "what failed leaves the model where it is"
    shown = json.dumps([component.render() for component in card.components])
    assert f"Task {SOURCES[0]}: failed" in shown and "Traceback" in shown


@pytest.mark.long
def test_process_killed_between_tasks_is_nobodys_failure(
    trained: tuple[Store, PinnedRecipe], capfd: pytest.CaptureFixture[str]
) -> None:
    pinned = changed(trained, max_rows=2)
    scorings = [Scoring("base", task) for task in SOURCES]
    scoring = outcomes(pinned, scorings, [])
    first = next(scoring)
    (worker,) = workers(os.getpid())
    os.kill(worker, signal.SIGKILL)
    (second,) = scoring
    assert [first.scoring, second.scoring] == scorings
    assert first.address is not None and second.address is not None
    assert capfd.readouterr().err.count("loaded=random weights") == 2, "the next process loads it anew"
    assert not workers(os.getpid())


@pytest.mark.long
def test_process_killed_at_a_task_is_that_tasks_failure(
    trained: tuple[Store, PinnedRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os, signal\ndef metric(output, answer, row):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))  # a metric is found where this process finds it
    pinned = changed(trained, metric_by_task={SOURCES[0]: "deadly:metric"}, max_rows=1)
    found = {one.scoring: one for one in outcomes(pinned, [Scoring(m, t) for m in MODELS for t in SOURCES], [])}
    assert found.pop(Scoring("base", SOURCES[0])).reason == "its process was killed; was there memory enough?"
    assert set(found) == {Scoring(model, SOURCES[1]) for model in MODELS}, "the tuned model is not tried"
    assert all(one.address is not None for one in found.values())


def test_share_is_scored_on_its_own_gpu_which_it_has_by_itself(
    trained: tuple[Store, PinnedRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "locks"))
    monkeypatch.setattr(task_shares, "visible_gpus", lambda: ["4", "7"])
    (tmp_path / "looking.py").write_text(LOOKING.format(folder=str(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    pinned = changed(trained, metric_by_task={SOURCES[0]: "looking:metric"}, max_rows=1)
    found = score(trained[0], pinned, [SOURCES[0]], 1, Card())
    assert found.failures == {}
    visible, *is_free = json.loads((tmp_path / "seen.json").read_text())
    assert visible == "7" and is_free == [[f"sft-flow-gpu-{os.getuid()}-7.lock", False]]


LOOKING = """
import json, os, pathlib
from filelock import FileLock, Timeout

FOLDER = pathlib.Path({folder!r})

def is_free(path):
    try:
        with FileLock(path, timeout=0):
            return True
    except Timeout:
        return False

def metric(output, answer, row):
    locks = [[path.name, is_free(path)] for path in (FOLDER / "locks").glob("*.lock")]
    (FOLDER / "seen.json").write_text(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], *locks]))
    return 1.0
"""


def test_process_that_does_not_start_is_told_once(
    trained: tuple[Store, PinnedRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with exit status 1 before its first task, twice"):
        list(outcomes(trained[1], [Scoring("base", task) for task in SOURCES], []))


PARENT = """
import pickle, sys
from steps.outcomes import Scoring, outcomes

pinned = pickle.load(open(sys.argv[1], "rb"))
list(outcomes(pinned, [Scoring("base", sys.argv[2])], []))
"""

MODELS = ("base", "tuned")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
def test_process_at_work_ends_with_whoever_started_it(
    trained: tuple[Store, PinnedRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        f"def metric(output, answer, row):\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(100)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pinned = changed(trained, metric_by_task={SOURCES[0]: "slow:metric"}, max_rows=1)
    (tmp_path / "pinned").write_bytes(pickle.dumps(pinned))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "pinned"), SOURCES[0]],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    wait_until(begun.exists, "the process to be at work")
    assert len(workers(parent.pid)) == 1
    parent.kill()
    parent.wait()
    wait_until(lambda: not workers(parent.pid), "it to end")
