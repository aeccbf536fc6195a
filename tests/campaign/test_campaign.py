"""A cut of the campaign: what all of it proves in twenty minutes, in two."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.campaign import bad_inputs, flips, kills, machines
from tests.campaign.pipeline import files_of, recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans end by the kernel on Linux only")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("campaign")
    kills.undisturbed(folder)
    return folder / "store"


@pytest.mark.long
def test_killed_run_ends_with_the_same_bits(clean: Path, tmp_path: Path) -> None:
    found = list(kills.lives(0, 5, tmp_path, files_of(clean)))
    assert sum(life.kills for life in found) >= 5
    assert kills.is_kept(found), found


@pytest.mark.long
def test_flipped_bits_are_refused_by_each_stage_that_reads_them(clean: Path, tmp_path: Path) -> None:
    found = list(flips.flips(0, 100, recipe(str(clean)), tmp_path))
    assert {flip.reader for flip in found} >= {
        "rendered",
        "tokens",
        "mixture",
        "packed",
        "trained",
        "evaluated",
        "release",
    }
    assert {flip.outcome for flip in found} == {flips.REFUSED, flips.UNREAD}
    assert flips.is_kept(found)


@pytest.mark.long
def test_two_machines_in_turn_end_with_the_same_bits(clean: Path, tmp_path: Path) -> None:
    found = list(machines.turns(0, 1, tmp_path, files_of(clean)))
    assert machines.is_kept(found), found


@pytest.mark.long
def test_bad_inputs_are_told_by_their_names(tmp_path: Path) -> None:
    number = len(bad_inputs.mistakes_in_files()) + 25
    found = list(bad_inputs.bad_inputs(0, number, tmp_path))
    assert len(found) == number
    assert bad_inputs.is_kept(found), [answer for answer in found if not bad_inputs.is_kept([answer])]
