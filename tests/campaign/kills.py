"""SIGKILLs at random moments and at random writes and renames of a run from rows to the released model."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.campaign.attempts import Attempt
from tests.campaign.pipeline import NUM_STEPS, SAVE_STEPS, files_of, recipe, steps_of

WHOLE_S = 600.0  # an undisturbed run takes about 30 s
MAX_EVENT = 120  # of one process; most have fewer


class Life(NamedTuple):
    """One run that was killed until it ended.

    events: the kills at writes or renames, among `kills`. not_resumed: attempts that failed by themselves. different:
    files that are not those of an undisturbed run. most_again: steps computed again after a kill, at most.
    """

    kills: int
    events: int
    not_resumed: int
    different: list[str]
    steps_again: int
    most_again: int


def undisturbed(folder: Path) -> dict[str, str]:
    """The files of a run that nobody killed. Raises RuntimeError where it fails."""
    store = folder / "store"
    attempt = Attempt(recipe(str(store)), folder)
    if attempt.ended_within(WHOLE_S) != 0:
        attempt.kill()
        raise RuntimeError(f"the undisturbed run failed: {attempt.log}")
    return files_of(store)


def lives(
    seed: int, num_kills: int, folder: Path, expected: dict[str, str], *, by_flow: bool = False
) -> Iterator[Life]:
    """Runs, one after another, until that many kills hit; the last run is left to end."""
    rng, hit = random.Random(seed), 0
    for number in itertools.count():
        if hit >= num_kills:
            return
        life = _life(rng, num_kills - hit, folder / f"life-{number}", expected, by_flow)
        hit += life.kills
        yield life


def _life(rng: random.Random, most_kills: int, folder: Path, expected: dict[str, str], by_flow: bool) -> Life:
    shutil.rmtree(folder, ignore_errors=True)
    store = folder / "store"
    kills = events = failed = 0
    while True:
        is_last = kills >= most_kills
        event = rng.randint(1, MAX_EVENT) if not is_last and rng.random() < 0.5 else None
        attempt = Attempt(recipe(str(store)), folder, by_flow=by_flow, event=event)
        # Half of the moments are in the first seconds, where the data stages are; a training starts after ten.
        moment = WHOLE_S if is_last or event is not None else rng.choice([rng.uniform(1, 6), rng.uniform(6, 30)])
        moment *= 2 if by_flow else 1
        code = attempt.ended_within(moment)
        attempt.kill()
        if code == 0:
            break
        if code is None or code < 0:
            kills += 1
            events += event is not None
        else:
            failed += 1
            if failed > 3:
                break
    found, steps = files_of(store), steps_of(store)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    again = [one - following + 1 for one, following in itertools.pairwise(steps) if following <= one]
    return Life(kills, events, failed, different, len(steps) - NUM_STEPS, max(again, default=0))


def as_row(found: list[Life]) -> tuple[str, str, str]:
    """(what was done, what was to come out, what came out)."""
    kills, events = sum(life.kills for life in found), sum(life.events for life in found)
    whole = sum(not life.different and not life.not_resumed for life in found)
    return (
        f"{kills} kills in {len(found)} runs, {events} of them at a write or rename",
        f"each run ends with the same bits, without other help; at most {SAVE_STEPS} steps again a kill",
        f"{whole} of {len(found)} runs; {sum(life.steps_again for life in found)} steps again, at most "
        f"{max((life.most_again for life in found), default=0)} after a kill",
    )


def is_kept(found: list[Life]) -> bool:
    return all(not life.different and not life.not_resumed and life.most_again <= SAVE_STEPS for life in found)
