import pytest

from sft_core.report.rows import ScoreRow
from sft_core.report.tables import overview_rows
from tests.report.columns import HEADER, OVERVIEW


def row(task: str, metric: str, base: float, tuned: float, flags: str | None = None) -> ScoreRow:
    values = (task, metric, 9, base, tuned, 0.1, tuned - base, tuned - base - 0.1, tuned - base + 0.1, flags)
    return ScoreRow.from_json(dict(zip(HEADER, values, strict=True)))


def test_score_row_is_read_back_as_it_is_written() -> None:
    rows = [row("copy", "loss", 3.0, 1.0, "worse than base"), row("copy", "exact_match", 0.0, 0.5)]
    for each in rows:
        assert tuple(each.to_json()) == HEADER and each.models == ["base", "tuned"]
        assert ScoreRow.from_json(each.to_json()) == each


def test_overview_has_the_losses_and_the_answers_score_of_a_task_in_one_row() -> None:
    scores = [row("copy", "loss", 3.0, 1.0), row("copy", "perplexity", 20.0, 2.7), row("copy", "exact_match", 0.0, 0.5)]
    (found,) = [overview.to_json() for overview in overview_rows(scores)]
    assert tuple(found) == OVERVIEW
    assert (found["base loss"], found["tuned loss"]) == (3.0, 1.0)
    assert (found["metric"], found["base"], found["tuned"], found["difference"]) == ("exact_match", 0.0, 0.5, 0.5)
    assert (found["low"], found["high"]) == (pytest.approx(0.4), pytest.approx(0.6))


def test_overview_of_a_task_without_answers_has_the_difference_of_its_losses() -> None:
    scores = [row("chat", "loss", 3.0, 1.0), row("chat", "token_accuracy", 0.1, 0.5)]
    (found,) = [overview.to_json() for overview in overview_rows(scores)]
    assert (found["metric"], found["base"], found["tuned"], found["difference"]) == (None, None, None, -2.0)


def test_overview_has_a_row_for_each_score_of_a_harness_task_and_no_loss() -> None:
    scores = [row("lm_eval:x", "acc", 0.1, 0.2), row("lm_eval:x", "acc_norm", 0.3, 0.4)]
    first, second = (overview.to_json() for overview in overview_rows(scores))
    assert (first["metric"], second["metric"]) == ("acc", "acc_norm")
    assert first["base loss"] is None and (second["base"], second["tuned"]) == (0.3, 0.4)


def test_overview_loses_no_flag_and_says_none_twice() -> None:
    scores = [
        row("a", "loss", 1.0, 2.0, "worse than base"),
        row("a", "perplexity", 2.7, 7.4, "worse than base"),
        row("a", "exact_match", 0.0, 0.5, "base is exactly 0"),
        row("a", "numeric", 0.5, 0.5),
        row("b", "loss", 1.0, 2.0, "worse than base"),
    ]
    assert [overview.flags for overview in overview_rows(scores)] == [
        "loss: worse than base; perplexity: worse than base; base is exactly 0",
        None,
        "loss: worse than base",
    ]
