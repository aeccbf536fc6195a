import pytest

from sft_core.search.rollouts import Point, Rollout, replay
from sft_core.search.strategies.baselines import Continual, Sft, SoftSro, Sro
from tests.search.scripted import curves, run

RISING = [0.1, 0.2, 0.3, 0.4, 0.5]
EARLY = [0.1, 0.5, 0.4, 0.3, 0.2]
LATE = [0.1, 0.2, 0.3, 0.5, 0.2]


def test_sft_is_one_rollout_over_everything_and_delivers_its_best_evaluation():
    search = Sft(["a", "b"], 3.0)
    assert run(search, lambda _: curves({"a": EARLY, "b": EARLY})) == [Rollout(0, None, ("a", "b"), 3.0)]
    assert search.best == Point(0, 1)
    assert search.ended_by == "1 roll-out done, as planned"


def test_continual_trains_one_task_after_another_from_the_last_ones_peak():
    search = Continual(["a", "b", "c"], 1.0)
    rollouts = run(search, lambda rollout: curves({"a": EARLY, "b": LATE, "c": RISING}))
    assert rollouts == [
        Rollout(0, None, ("a",), 1.0),
        Rollout(1, Point(0, 1), ("b",), 1.0),
        Rollout(2, Point(1, 3), ("c",), 1.0),
    ]


def test_sro_starts_again_and_each_task_leaves_at_its_peak():
    search = Sro(["a", "b", "c"], 1.0)
    rollouts = run(search, lambda rollout: curves({"a": RISING, "b": EARLY, "c": LATE}))
    assert rollouts == [
        Rollout(0, None, ("a", "b", "c"), 1.0),
        Rollout(1, None, ("a", "b", "c"), 0.25),
        Rollout(2, Point(1, 4), ("a", "c"), 0.5),
        Rollout(3, Point(2, 4), ("a",), 0.25),
    ]


def test_sro_leaves_out_who_peaks_at_the_start():
    search = Sro(["a", "b"], 1.0)
    rollouts = run(search, lambda rollout: curves({"a": [0.9, 0.1, 0.1, 0.1, 0.1], "b": RISING}))
    assert [rollout.active for rollout in rollouts] == [("a", "b"), ("b",)]


def test_soft_sro_draws_rows_in_proportion_to_rows_times_peak():
    search = SoftSro(["a", "b", "c"], 2.0, sizes={"a": 100, "b": 300, "c": 50})
    rollouts = run(search, lambda _: curves({"a": RISING, "b": EARLY, "c": [0.5, 0.1, 0.1, 0.1, 0.1]}))
    assert rollouts[1].start is None and rollouts[1].epochs == 2.0
    assert rollouts[1].rows == {"a": round(450 * 100 / 175), "b": round(450 * 75 / 175)}


@pytest.mark.parametrize(
    "new",
    [
        lambda: Sft("ab", 1.0),
        lambda: Continual("ab", 1.0),
        lambda: Sro("ab", 1.0),
        lambda: SoftSro("ab", 1.0, sizes={"a": 1, "b": 2}),
    ],
)
def test_same_journal_leads_to_the_same_plan_and_what_it_asks_for_was_kept(new):
    search, journal, kept = new(), [], set()
    while (rollout := search.propose()) is not None:
        assert rollout.start is None or rollout.start in kept
        found = curves({"a": LATE, "b": EARLY})
        alive: set[int] = set()
        for evaluation in range(5):
            alive = (alive | {evaluation}) & search.wanted(found.until(evaluation))
        kept |= {Point(rollout.round, evaluation) for evaluation in alive}
        kept &= {point for point in kept if point.round < rollout.round or point.evaluation in search.kept(found)}
        journal.append(found)
        search.observe(found)
    assert search.best in kept
    again = new()
    replay(again, journal)
    assert again.propose() is None and again.best == search.best
    with pytest.raises(ValueError, match="the journal has more roll-outs"):
        replay(new(), [*journal, journal[0]])
