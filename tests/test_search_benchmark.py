"""benchmarks/search.py in small: it runs to its tables, goes on where it was, and tells what the store holds."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.search import T_95, interval, summaries, variants
from sft_core.store.ref import Ref
from sft_core.store.store import Store

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("sft", "msft robust")


def run(folder: Path) -> tuple[str, dict[str, Any]]:
    """What it prints, and what it writes."""
    command = [sys.executable, "benchmarks/search.py", "--small", "--seeds", "1", "--store", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--strategies", *STRATEGIES], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "results.json").read_text())


def builds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "builds.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_search_benchmark_tells_what_the_store_holds_and_trains_nothing_again(tmp_path: Path) -> None:
    printed, results = run(tmp_path)
    built, store = builds(tmp_path), Store(tmp_path)
    of = {stage: [one for one in built if one["stage"] == stage] for stage in ("trained", "report")}
    assert [run["strategy"] for run in results["runs"]] == list(STRATEGIES)
    for run_of, report in zip(results["runs"], of["report"], strict=True):
        scores = store.manifest(Ref(*report["ref"].split("/")))["counts"]["scores"]
        for metric in ("exact_match", "loss"):
            assert run_of[metric] == {row["task"]: row["tuned"] for row in scores if row["metric"] == metric}
    # In the order of the runs: the start model, the control, plain SFT, the roll-outs of the search.
    costs = []
    for one in of["trained"][1:]:
        folder = store.path(Ref(*one["ref"].split("/")))
        costs.append(json.loads((folder / "curves.json").read_text())["cost"]["training_flops"])
    num_control = results["control"][0]["rollouts"]
    plain, search = results["runs"]
    assert plain["training_flops"] == costs[num_control]
    assert search["training_flops"] == pytest.approx(sum(costs[num_control + 1 :]))
    # Two roll-outs of an epoch are as much as plain SFT trains, and a third would be more.
    assert [one["dropped"] for one in search["rollouts"]] == [[], []]
    assert search["training_flops"] == pytest.approx(plain["training_flops"], rel=1e-3)
    for row in results["strategies"]:
        mine = next(run for run in results["runs"] if run["strategy"] == row["strategy"])
        assert row["loss"] == pytest.approx(statistics.mean(mine["loss"].values())) and f"{row['loss']:.3f}" in printed
    assert json.loads(printed.splitlines()[-1])["strategies"] == results["strategies"]

    again, same = run(tmp_path)
    assert builds(tmp_path) == built, "the second start built something"
    assert same == results and again == printed


def test_search_benchmark_knows_every_strategy_of_a_recipe() -> None:
    from sft_core.recipe.parse import parse_recipe
    from tests.search.test_searching import recipe

    names = [str(variant) for variant in variants()]
    assert len({*names}) == len(names) >= 6
    for variant in variants():
        search = {"strategy": variant.strategy, **({"preset": variant.preset} if variant.preset else {})}
        assert parse_recipe(recipe(**search)).last_phase.search is not None


def test_summaries_pair_strategies_by_their_seed() -> None:
    cost = {"training_flops": 1.0, "evaluation_flops": 1.0, "bytes": 1, "seconds": 1.0, "rollouts": [{}]}

    def made(strategy: str, seed: int, score: float) -> dict[str, Any]:
        both = {"a": score - 0.1, "b": score + 0.1}
        return {"strategy": strategy, "seed": seed, "exact_match": both, "loss": both, **cost}

    scores = {"sft": {0: 0.2, 1: 0.5, 2: 0.8}, "msft robust": {2: 0.93, 0: 0.29, 1: 0.61}}
    runs = [made(name, seed, score) for name, by_seed in scores.items() for seed, score in by_seed.items()]
    plain, search = summaries(runs)
    assert (plain["exact_match"], plain["exact_match_gain"]) == (pytest.approx(0.5), None)
    assert plain["exact_match_half_width"] == pytest.approx(4.303 * 0.3 / 3**0.5)
    # The seeds differ far more than the strategies of a seed do.
    assert search["exact_match_gain"] == pytest.approx(0.11)
    assert search["exact_match_gain_half_width"] == pytest.approx(4.303 * 0.02 / 3**0.5)
    assert (search["spread"], search["worst"]) == (pytest.approx(0.1), pytest.approx(0.51))
    assert interval([0.5]) == (0.5, None) and len(T_95) == 10
