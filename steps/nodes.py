"""Training on several nodes: the tasks of a gang find each other, and all but the first join its round."""

from __future__ import annotations

import os
import zlib
from typing import Any

from sft_core.pins.pinned import PinnedRecipe
from sft_core.store.stage import Located, Part
from sft_core.store.store import Store
from sft_core.train.launch import comes_true, join_training, node_environment
from steps.train import TRAINED
from steps.training_job import rank_module

STARTED_WITHIN_S = 7200.0  # the first node may have to upload the checkpoint that a phase starts from


def meet_other_nodes(parallel: Any, attempt: str) -> None:
    """Sets the environment by which this task's ranks find the ranks of the gang's other tasks.

    parallel: Metaflow's current.parallel. attempt: names this try of this run; the port follows from it, so the ranks
    cannot meet processes that another try left.
    """
    port = 20_000 + zlib.crc32(attempt.encode()) % 10_000
    nodes = {"node": parallel.node_index, "num_nodes": parallel.num_nodes}
    os.environ.update(node_environment(**nodes, address=parallel.main_ip, port=port))


def join_round(store: Store, pinned: PinnedRecipe, part: Part) -> str:
    """Joins the training of the gang's first task, and returns the address of the output that the first task stores."""
    # The round has no key before the first node has made the checkpoint that the phase starts from.
    if not comes_true(lambda: _located(store, pinned, part).ref is not None, STARTED_WITHIN_S):
        raise FileNotFoundError(f"{part}: the first node did not make the checkpoint that it starts from")
    located = _located(store, pinned, part)
    assert located.ref is not None
    join_training(
        store.scratch(located.ref),
        pinned.recipe.runtime,
        rank_module(pinned, pinned.phase_name(part)),
        lambda: _located(store, pinned, part).status == "hit",
    )
    return str(located.ref)


def _located(store: Store, pinned: PinnedRecipe, part: Part) -> Located:
    store.refresh()
    return store.locate(TRAINED, pinned, part)
