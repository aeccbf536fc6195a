"""mSFT over scripted curves: exactly the published search, and the one that knows noise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_core.search.peaks import first_highest, peak_of
from sft_core.search.rollouts import Curves, Point, Rollout, replay
from sft_core.search.strategies.msft import Limits, Msft, RobustMsft
from tests.search.scripted import curves, run

RISING = [0.1, 0.2, 0.3, 0.4, 0.5]
EARLY = [0.1, 0.5, 0.4, 0.3, 0.2]  # highest at evaluation 1
LATE = [0.1, 0.2, 0.3, 0.5, 0.2]  # at 3
AT_ONCE = [0.9, 0.5, 0.4, 0.3, 0.2]  # at 0


def paper(*tasks: str, max_rollouts: int = 10) -> Msft:
    return Msft(tasks, 1.0, Limits(max_rollouts))


def robust(*tasks: str, **options: object) -> RobustMsft:
    return RobustMsft(tasks, 1.0, Limits(10), **options)  # type: ignore[arg-type]


def test_paper_drops_the_task_that_peaks_first_and_rolls_back_to_its_peak():
    search = paper("a", "b", "c")
    assert search.propose() == Rollout(0, None, ("a", "b", "c"), 1.0)
    decision = search.observe(curves({"a": RISING, "b": LATE, "c": EARLY}))
    assert (decision.dropped, decision.start, decision.epochs) == (("c",), Point(0, 1), 0.25)
    assert search.propose() == Rollout(1, Point(0, 1), ("a", "b"), 1.0)
    decision = search.observe(curves({"a": RISING, "b": LATE, "c": AT_ONCE}))
    assert (decision.dropped, decision.start, decision.epochs) == (("b",), Point(1, 3), 1.0)
    assert search.propose() == Rollout(2, Point(1, 3), ("a",), 1.0)


def test_paper_takes_the_first_of_equal_peaks_and_of_equal_tasks_the_first_by_name():
    search = paper("b", "a")
    level = [0.1, 0.4, 0.4, 0.4, 0.2]
    decision = search.observe(curves({"b": level, "a": level}))
    assert (decision.dropped, decision.start) == (("a",), Point(0, 1))


def test_paper_counts_the_start_as_a_peak():
    search = paper("a", "b")
    decision = search.observe(curves({"a": AT_ONCE, "b": RISING}))
    assert (decision.dropped, decision.start, decision.epochs) == (("a",), Point(0, 0), 0.0)


def test_paper_drops_nobody_when_all_peak_last_and_uses_a_rollout_up():
    search = paper("a", "b", max_rollouts=3)
    rollouts = run(search, lambda rollout: curves({"a": RISING, "b": RISING}))
    assert [rollout.active for rollout in rollouts] == [("a", "b")] * 3
    assert rollouts[2].start == Point(1, 4)
    assert search.ended_by == "max_rollouts: 3 roll-outs done"


def test_paper_scores_of_zero_and_plateaus_peak_at_once():
    search = paper("a", "b")
    rollouts = run(search, lambda rollout: curves({"a": [0.0] * 5, "b": [0.3] * 5}))
    assert [rollout.active for rollout in rollouts] == [("a", "b"), ("b",)]
    assert search.ended_by == "every task is dropped"


def test_paper_delivers_the_best_pooled_evaluation_over_all_rollouts():
    search = paper("a", "b")
    search.observe(curves({"a": EARLY, "b": RISING}))  # pooled is highest at evaluation 1 and 3, first at 1
    assert search.best == Point(0, 1)
    search.observe(curves({"a": [0.5, 0.5, 0.5, 0.5, 0.5], "b": [0.3, 0.2, 0.1, 0.6, 0.1]}))
    assert search.best == Point(1, 3)
    search_by_rows = paper("a", "b")
    few, many = np.array([[0.9], [0.0]]), np.array([[0.0] * 9, [0.5] * 9])
    search_by_rows.observe(Curves([0, 0.25], {"a": few, "b": many}))
    assert search_by_rows.best == Point(0, 1), "every row counts the same"


def test_one_task_is_searched_too():
    search = paper("a")
    assert len(run(search, lambda rollout: curves({"a": LATE}))) == 1
    assert search.best == Point(0, 3)


def test_limits_end_a_search_with_their_reason():
    limits = Limits(10, max_epochs=2.0)
    search = Msft(["a"], 1.0, limits)
    assert len(run(search, lambda rollout: curves({"a": RISING}))) == 2
    assert search.ended_by == "max_epochs: 2 epochs are trained, of 2"
    search = Msft(["a"], 1.0, Limits(10, max_idle=3))
    assert len(run(search, lambda rollout: curves({"a": RISING}))) == 3
    assert search.ended_by == "max_idle: 3 roll-outs in a row dropped no task"


def test_larger_limit_goes_on_from_the_same_journal():
    journal = [curves({"a": RISING, "b": RISING}), curves({"a": RISING, "b": EARLY})]
    short, long = paper("a", "b", max_rollouts=2), paper("a", "b", max_rollouts=3)
    assert replay(short, journal) == replay(long, journal)
    assert short.propose() is None
    assert long.propose() == Rollout(2, Point(1, 1), ("a",), 1.0)


def test_not_a_number_ends_with_an_error_that_names_the_task():
    with pytest.raises(ValueError, match="b: a selection score is not a number"):
        curves({"a": RISING, "b": [0.1, float("nan"), 0.1, 0.1, 0.1]})
    with pytest.raises(ValueError, match=r"a: found scores of shape \(2, 0\)"):
        Curves([0, 1], {"a": np.zeros((2, 0))})


NUM_EVALUATIONS = 9
SCORES = st.lists(st.floats(0, 1), min_size=NUM_EVALUATIONS, max_size=NUM_EVALUATIONS)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(journal=st.lists(st.tuples(SCORES, SCORES, SCORES), max_size=6), is_robust=st.booleans())
def test_same_journal_leads_to_the_same_decisions_and_weights_that_were_kept(journal, is_robust):
    def new():
        return robust("a", "b", "c") if is_robust else paper("a", "b", "c")

    def measured(scores):
        return curves(dict(zip("abc", scores, strict=True)), rows=20, noise=0.05)

    first, seen, kept = new(), [], {}
    for scores in journal:
        rollout = first.propose()
        if rollout is None:
            break
        assert rollout.start is None or rollout.start in kept
        found = measured(scores)
        # What is kept while it runs holds what the decision asks for at its end.
        alive: set[int] = set()
        for evaluation in range(NUM_EVALUATIONS):
            alive = (alive | {evaluation}) & first.wanted(found.until(evaluation))
        alive &= first.kept(found)
        decision = first.observe(found)
        assert decision.start.evaluation in alive
        kept |= {Point(rollout.round, evaluation): True for evaluation in alive}
        assert first.best in kept
        seen.append((found, decision))
    again = new()
    assert replay(again, [found for found, _ in seen]) == [decision for _, decision in seen]
    assert again.propose() == first.propose()
    assert set(first.propose().active if first.propose() else ()) <= {"a", "b", "c"}


def noisy(scores: dict[str, list[float]], seed: int) -> Curves:
    return curves(scores, rows=200, noise=0.4, seed=seed)


def test_robust_excludes_nobody_where_nobody_falls_and_paper_does():
    flat = {task: [0.2, 0.4, 0.5, 0.55, 0.57, 0.58, 0.58, 0.58, 0.58] for task in "abcde"}
    falsely = {"paper": 0, "robust": 0}
    for seed in range(40):
        falsely["paper"] += bool(paper(*"abcde").observe(noisy(flat, seed)).dropped)
        falsely["robust"] += bool(robust(*"abcde").observe(noisy(flat, seed)).dropped)
    assert falsely["paper"] >= 35
    assert falsely["robust"] <= 4


def test_robust_finds_who_falls_and_when():
    falls = [0.2, 0.4, 0.6, 0.55, 0.45, 0.4, 0.35, 0.3, 0.25]
    rises = [0.1 + 0.05 * number for number in range(9)]
    errors = []
    for seed in range(40):
        decision = robust("a", "b").observe(noisy({"a": falls, "b": rises}, seed))
        assert decision.dropped == ("a",)
        errors.append(abs(decision.start.evaluation - 2))
    assert np.mean(errors) < 0.5


def test_robust_drops_tasks_that_peak_together_together():
    falls = [0.2, 0.6, 0.5, 0.3, 0.1]
    decision = robust("a", "b", "c").observe(curves({"a": falls, "b": RISING, "c": falls}, rows=50, noise=0.01))
    assert (decision.dropped, decision.start) == (("a", "c"), Point(0, 1))


def test_robust_ends_a_rollout_once_nobody_can_have_peaked_earlier():
    search = robust("a", "b")
    found = curves({"a": [0.2, 0.6, 0.5, 0.4, 0.3], "b": RISING}, rows=50, noise=0.01)
    decided = [search.is_decided(found.until(evaluation)) for evaluation in range(5)]
    assert decided == [False, False, False, True, True]
    assert not robust("a", "b").is_decided(curves({"a": RISING, "b": RISING}, rows=50, noise=0.01))
    falls = np.array([[0.2, 0.3, 0.6, 0.4, 0.1]]).T + np.linspace(0, 0.1, 10)
    unsure = np.array([[0.5, 0.7, 0.6, 0.6, 0.6], [0.5, 0.55, 0.57, 0.57, 0.57]]).T.repeat(5, axis=1)
    assert robust("a", "b").observe(Curves(found.epochs, {"a": falls, "b": unsure})).dropped == ("a",)
    assert not robust("a", "b").is_decided(Curves(found.epochs, {"a": falls, "b": unsure})), "b may have peaked earlier"
    assert paper("a", "b").is_decided(found) is False


def test_robust_takes_a_forgotten_task_back_when_asked():
    falls, forgets = [0.2, 0.6, 0.5, 0.3, 0.2], [0.6, 0.5, 0.4, 0.3, 0.1]
    for readmit in (False, True):
        search = robust("a", "b", readmit=readmit)
        search.observe(curves({"a": falls, "b": RISING}, rows=50, noise=0.01))
        decision = search.observe(curves({"a": forgets, "b": RISING}, rows=50, noise=0.01))
        assert decision.readmitted == (("a",) if readmit else ())
        assert search.propose().active == (("a", "b") if readmit else ("b",))


def test_evidence_and_reason_are_told():
    decision = robust("a", "b").observe(curves({"a": [0.2, 0.6, 0.5, 0.3, 0.1], "b": RISING}, rows=50, noise=0.01))
    assert decision.reason == "a peaked first, 0.25 epochs into the roll-out"
    assert decision.evidence["a"]["p"] < decision.evidence["a"]["level"] < decision.evidence["b"]["p"]
    assert decision.evidence["a"]["drop"] == pytest.approx((0.2 + 0.6 + 0.5) / 3 - 0.1, abs=0.01)


def test_robust_goes_back_to_weights_that_are_there_when_the_fit_turns_back():
    turns = [0.3, 0.9, 0.9, 0.5, 0.3, 0.9, 0.9, 0.7, 0.5, 0.0, 0.0, 0.0]
    found = curves({"a": turns, "b": [0.01 * number for number in range(12)]}, rows=20, noise=0.001)
    search, alive = robust("a", "b"), set()
    for evaluation in range(12):
        alive = (alive | {evaluation}) & search.wanted(found.until(evaluation))
    fitted = peak_of(found.rows["a"]).evaluation
    assert fitted not in alive, "its weights are gone by the time that the fit is at it"
    decision = search.observe(found)
    assert decision.dropped == ("a",)
    assert decision.start.evaluation == min(alive, key=lambda number: abs(number - fitted))


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(3, 5))
@settings(max_examples=60, deadline=None)
def test_robust_keeps_no_more_weights_than_allowed_and_goes_back_to_one_of_them(seed: int, max_kept: int):
    rng = np.random.default_rng(seed)
    scores = {task: rng.random(9).tolist() for task in "abcdef"}
    found = curves(scores, rows=10, noise=0.001, seed=seed)
    search, alive, free = robust(*"abcdef", max_kept=max_kept), {0}, robust(*"abcdef")
    for evaluation in range(9):
        wanted = search.wanted(found.until(evaluation))
        assert len(wanted) <= max_kept
        so_far = found.until(evaluation)
        peaks = {peak_of(so_far.rows[task]).evaluation for task in scores}
        assert min(peaks | {first_highest(so_far.of(task)) for task in scores}) in wanted, "the earliest"
        alive = (alive | {evaluation}) & wanted
    assert search.kept(found) <= alive
    decision, unbound = search.observe(found), free.observe(found)
    assert decision.dropped == unbound.dropped
    assert decision.start.evaluation in alive
