"""The weights that a search ends with, as a checkpoint of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_core.links import link_files
from sft_core.search.evaluations import evaluation_folder

if TYPE_CHECKING:
    from sft_core.store.stage import Build


def build_delivered(build: Build, *, evaluation: int) -> dict[str, int]:
    """Writes model/: the files of an evaluation of a roll-out, linked where the file system allows."""
    link_files(evaluation_folder(build.inputs["trained"], evaluation), build.out / "model")
    return {"evaluation": evaluation}
