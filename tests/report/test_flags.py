from typing import Any

import pytest

from sft_core.report.flags import Answers, red_flags
from sft_core.report.rows import ScoreRow
from sft_core.report.tables import score_rows
from tests.report.columns import HEADER


def score(base: float = 0.2, tuned: float = 0.4, **changes: Any) -> ScoreRow:
    values = {"task": "copy", "metric": "exact_match", "n": 9, "stderr": 0.1, "low": 0.1, "high": 0.3, **changes}
    return ScoreRow(by_model={"base": base, "tuned": tuned}, difference=tuned - base, **values)


def answers(answers: int = 100, empty: int = 0, cut_off: int = 0) -> Answers:
    return Answers("exact_match", answers, empty, cut_off)


@pytest.mark.parametrize(
    ("row", "of_tuned", "flags"),
    [
        (score(), answers(), []),
        (score(), None, []),
        (score(tuned=0.0), None, ["tuned is exactly 0"]),
        (score(base=0.0), None, ["base is exactly 0"]),
        (score(low=-0.3, high=-0.1), None, ["worse than base"]),
        (score(low=-0.3, high=0.1), None, []),
        (score(low=None, high=None), None, []),
        (score(task="lm_eval:x", metric="x exact_match,strict-match", low=-0.3, high=-0.1), None, ["worse than base"]),
        (score(task="lm_eval:x", metric="brier_score", low=-0.3, high=-0.1), None, []),
        (score(metric="loss", low=-0.3, high=-0.1), None, []),
        (score(metric="loss"), None, ["worse than base"]),
        (score(metric="perplexity"), None, ["worse than base"]),
        (score(), answers(cut_off=5), []),
        (score(), answers(cut_off=6), ["6% cut off"]),
        (score(), answers(empty=1), ["1 of 100 answers empty"]),
        (score(), answers(answers=0), []),
    ],
)
def test_red_flags_are_said_in_words(row: ScoreRow, of_tuned: Answers | None, flags: list[str]) -> None:
    assert red_flags(row, of_tuned and {"tuned": of_tuned, "base": answers()}) == flags


def test_base_whose_answers_are_cut_off_is_told() -> None:
    assert red_flags(score(), {"tuned": answers(), "base": answers(cut_off=6)}) == ["answers of base cut off"]
    assert red_flags(score(), {"tuned": answers(), "base": answers(cut_off=5, empty=9)}) == []


def test_score_rows_have_differences_and_flags_of_the_answers_metric_alone() -> None:
    def scores(loss: float, match: float) -> list[dict[str, Any]]:
        values = {"loss": loss, "exact_match": match}
        return [{"metric": name, "value": value, "stderr": None, "n": 9} for name, value in values.items()]

    by_task = {
        "a": {"base": scores(2, 0.5), "tuned": scores(1, 0.0)},
        "b": {"base": scores(2, 1), "tuned": scores(1, 1)},
    }
    compared = {"a": {"exact_match": {"value": -0.5, "low": -0.8, "high": -0.2}}}
    by_model = {"a": {"tuned": answers(cut_off=30), "base": answers()}}
    rows = [row.to_json() for row in score_rows(by_task, compared, by_model)]
    assert all(tuple(row) == HEADER for row in rows)
    flags = {(row["task"], row["metric"]): row["flags"] for row in rows}
    assert flags.pop(("a", "exact_match")) == "tuned is exactly 0; worse than base; 30% cut off"
    assert set(flags.values()) == {None}
    assert rows[1]["difference"] == -0.5 and rows[0]["difference"] is None
