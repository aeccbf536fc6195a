"""What a run is compared with, traced back to and talked to by, over real runs."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import read_index
from sft_core.evaluate.rows import read_rows
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cli.lineage import trace
from steps.cli.row_journey import steps_of
from tests.flows.conftest import Project

CHANGED_RATE = "training.learning_rate=3e-3"


@pytest.fixture(scope="module")
def two_runs(finished: Project) -> tuple[Project, str, str]:
    """The first run, and one with another learning rate."""
    finished.run("run", "--set", CHANGED_RATE)
    code = "from metaflow import Flow, namespace; namespace(None); print(*(run.id for run in Flow('SFTFlow')))"
    ids = finished.call([sys.executable, "-c", code]).split()
    return finished, ids[-1], ids[0]


@pytest.mark.long
def test_compare_tells_what_differs_and_the_paired_difference(two_runs: tuple[Project, str, str]) -> None:
    project, first, second = two_runs
    found = json.loads(project.sft("compare", first, "latest", "--json"))
    assert [run["id"] for run in found["runs"]] == [first, second]
    assert found["recipe"] == [{"key": "training.learning_rate", "a": 1e-3, "b": 3e-3}]
    amounts = {row["name"]: (row["a"], row["b"]) for row in found["amounts"]}
    assert amounts["steps"] == (4, 4) and amounts["packs"][0] == amounts["packs"][1] > 0
    assert amounts["last loss"][0] != amounts["last loss"][1] and amounts["trained tokens an epoch"][0] > 0
    assert all(seconds > 0 for seconds in amounts["seconds of training"])
    rows = {row["metric"]: row for row in found["scores"]}
    assert set(rows) == {"loss", "perplexity", "token_accuracy", "exact_match"}
    loss = rows["loss"]
    assert loss["difference"]["n"] == loss["a"]["n"] == 8
    assert loss["difference"]["value"] == pytest.approx(loss["b"]["tuned"] - loss["a"]["tuned"])
    assert loss["difference"]["low"] < loss["difference"]["value"] < loss["difference"]["high"]
    text = project.sft("compare", f"SFTFlow/{first}", second)
    for shown in ("training.learning_rate", "0.003", "steps", "checksum_think", "B - A"):
        assert shown in text


@pytest.mark.long
def test_answers_of_a_run_are_its_rows_with_prompts_and_both_models_outputs(two_runs: tuple[Project, str, str]) -> None:
    project, first, _ = two_runs
    rows = [json.loads(line) for line in project.sft("answers", first, "--json").splitlines()]
    stored = json.loads(project.sft("lineage", first, "--json"))["outputs"]
    tuned = next(of(name) for name, one in stored.items() if one["part"].get("model") == "tuned")
    table = read_rows(Store(project.store).path(tuned)).to_pylist()
    assert len(rows) == len(table) == 8 and {row["task"] for row in rows} == {"checksum_think"}
    by_id = {row["row_id"]: row for row in table}
    for row in rows:
        one = by_id[row["row_id"]]
        assert (row["wanted"], row["tuned"]) == (one["answer"], one["outputs"])
        assert row["score"]["tuned"] == one["score"] and len(row["base"]) == 1
        assert row["asked"] == one["prompt"] and "checksum: " in row["asked"] and row["asked"].endswith("assistant\n")
        assert row["change"] == ("won" if one["score"] > row["score"]["base"] else "same")
    shown = project.sft("answers", "latest", "--task", "checksum_think", "--limit", "2")
    assert shown.count("  asked  ") == shown.count("  tuned  ") == 2
    assert project.sft("answers", first, "--only", "lost") == ""
    told = project.sft("answers", first, "--task", "checksum", succeeds=False)
    assert "found 'checksum'; it is no task whose rows are kept here; did you mean" in told and "checksum_think" in told


@pytest.mark.long
def test_compare_unknown_run_names_the_known_ones(two_runs: tuple[Project, str, str]) -> None:
    project, first, second = two_runs
    told = project.sft("compare", "17", "latest", succeeds=False)
    assert "found '17'; it is no run" in told and first in told and second in told and "Traceback" not in told


@pytest.mark.long
def test_lineage_of_a_run_leads_from_its_report_to_the_files(two_runs: tuple[Project, str, str]) -> None:
    project, first, _ = two_runs
    found = json.loads(project.sft("lineage", first, "--json"))
    stages = [name.split("/")[0] for name in found["outputs"]]
    assert found["root"].startswith("report/") and found["removed"] == []
    assert set(stages) == {"report", "evaluated", "trained", "packed", "mixture", "tokens", "rendered", "conversations"}
    trained = next(output for output in found["outputs"].values() if output["stage"] == "trained")
    assert trained["start_model"] == {"random": "llama", "seed": 42}
    text = project.sft("lineage", first)
    assert text.index("report/") < text.index("trained/") < text.index("mixture/") < text.index("checksum_think.jsonl")


@pytest.mark.long
def test_lineage_of_a_row_names_the_steps_that_the_training_log_has_it_in(two_runs: tuple[Project, str, str]) -> None:
    """The log tells a loss for each source that a step trained on; packs mostly hold one source here."""
    project, _, second = two_runs
    outputs = json.loads(project.sft("lineage", second, "--json"))["outputs"]
    store = Store(project.store)
    packed, trained = (
        next(of(name) for name in outputs if name.startswith(f"{kind}/")) for kind in ("packed", "trained")
    )
    plan, sources = PackPlan.read(store.path(packed)), store.manifest(packed)["identity"]["section"]["sources"]
    traced = trace(store, trained)
    by_step: dict[int, list[int]] = {}
    for pack in range(len(plan)):
        for step in steps_of(store, traced, trained, plan, [pack]) or []:
            by_step.setdefault(step, []).append(pack)
    assert {step: len(packs) for step, packs in by_step.items()} == {1: 2, 2: 2, 3: 2, 4: 2}
    logged = [json.loads(line) for line in (store.path(trained) / "logs" / "log.jsonl").read_text().splitlines()]
    trained_on = []
    for event in logged:
        documents = [plan.source[plan.offsets[pack] : plan.offsets[pack + 1]] for pack in by_step[event["step"]]]
        trained_on.append({f"loss/{sources[number]}" for number in np.concatenate(documents).tolist()})
        assert {name for name in event if name.startswith("loss/")} == trained_on[-1]
    assert len(trained_on) == 4 and {"loss/checksum_think"} in trained_on and {"loss/checksum_no_think"} in trained_on

    document = int(plan.offsets[by_step[2][0]])
    source = sources[plan.source[document]]
    tokens = next(
        of(name) for name, one in outputs.items() if (one["stage"], one["part"].get("source")) == ("tokens", source)
    )
    row_id = read_index(store.path(tokens))["row_id"][int(plan.row[document])].as_py()
    journeys = json.loads(project.sft("lineage", second, "--row", row_id, "--json"))
    journey = next(one for one in journeys if one["source"] == source)
    assert journey["packs"] == [
        {
            "packed": str(packed),
            "packs": [by_step[2][0]],
            "num_tokens": [int(plan.num_tokens[document])],
            "steps": {str(trained): [2]},
        }
    ]


def of(address: str) -> Ref:
    return Ref(*address.split("/"))


@pytest.mark.long
def test_chat_with_the_latest_run_is_with_its_release(two_runs: tuple[Project, str, str]) -> None:
    project, _, _ = two_runs
    asked = ("--prompt", "checksum: 310", "--max-new-tokens", "4", "--temperature", "0")
    answer = project.sft("chat", "latest", *asked)
    assert answer.strip()
    folder = project.sft("scores").partition("checkpoint: ")[2].splitlines()[0]
    assert project.sft("chat", folder, *asked) == answer
