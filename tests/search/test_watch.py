"""A roll-out under way: which weights stay, and what a resumed one knows."""

from pathlib import Path
from typing import Any

import numpy as np

from sft_core.search.strategies.msft import Limits, Msft, RobustMsft
from sft_core.search.watch import RolloutWatch
from sft_core.train.row_losses import RowLosses

SOURCES = ["other", "a", "b"]  # the search knows two of the three
FALLS, RISES = [0.5, 0.9, 0.7, 0.5, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]


def losses(a: float, b: float) -> RowLosses:
    """Two rows of each source, of 10 trained tokens; a score is minus the loss per token."""
    means = np.repeat([9.9, -a, -b], 2) + np.tile([-0.01, 0.01], 3)
    return RowLosses(10 * means, np.full(6, 10.0), np.repeat([0, 1, 2], 2))


def save(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_text(folder.name)


def there(out: Path) -> set[str]:
    return {path.name for path in (out / "evaluations").iterdir()}


def watch(out: Path, search: Any = None) -> RolloutWatch:
    return RolloutWatch(search or Msft(["a", "b"], 1.0, Limits(9)), ["a", "b"], SOURCES, out, 4)


def test_watch_keeps_the_weights_that_can_still_be_asked_for(tmp_path: Path):
    one = watch(tmp_path)
    kept = []
    for step, scores in enumerate(zip(FALLS, RISES, strict=True)):
        kept.append(one.see(step, losses(*scores), save)["kept"])
        one.saved()
        assert there(tmp_path) == {f"{evaluation:03}" for evaluation in kept[-1]}
    # a is highest at 1, b and the last are 4; both together are highest at 1.
    assert kept == [[0], [1], [1, 2], [1, 3], [1, 4]]
    assert one.most_kept == 2
    assert one.curves.epochs == [0, 0.25, 0.5, 0.75, 1.0]
    assert set(one.curves.rows) == {"a", "b"}
    assert np.allclose(one.curves.of("a"), FALLS)
    one.keep_only({1})
    assert there(tmp_path) == {"001"}


def test_watch_removes_weights_only_once_a_checkpoint_is_whole(tmp_path: Path):
    one = watch(tmp_path)
    for step, scores in enumerate(zip(FALLS[:3], RISES[:3], strict=True)):
        one.see(step, losses(*scores), save)
    assert there(tmp_path) == {"000", "001", "002"}, "a kill would go back to before them"
    one.saved()
    assert there(tmp_path) == {"001", "002"}


def test_watch_that_goes_on_knows_what_was_seen(tmp_path: Path):
    one, events = watch(tmp_path), []
    for step, scores in enumerate(zip(FALLS, RISES, strict=True)):
        events.append({"step": step, **one.see(step, losses(*scores), save)})
    other = watch(tmp_path)
    other.begin(events[:3])
    for step in (3, 4):
        again = other.see(step, losses(FALLS[step], RISES[step]), lambda folder: None)
        assert {"step": step, **again} == events[step]
    assert other.most_kept == one.most_kept


def test_watch_ends_a_rollout_that_is_decided(tmp_path: Path):
    search = RobustMsft(["a", "b"], 1.0, Limits(9))
    one, decided = watch(tmp_path, search), []
    for step, scores in enumerate(zip(FALLS, RISES, strict=True)):
        one.see(step, losses(*scores), save)
        decided.append(one.is_decided)
    assert decided == [False, False, False, True, True]
