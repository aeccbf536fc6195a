"""Packs as model inputs: documents one after another, positions restarting, labels for trained tokens only."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from sft_core.data.packing import PackPlan
from sft_core.data.shards import TokenRow, TokenShards
from sft_core.train.schedule import EMPTY

IGNORED = -100


class PackCollator:
    """Turns a slot of the schedule into one sequence of the pack's documents.

    transformers isolates documents when positions restart at 0, no attention mask is given and no cache is
    used; so no mask is given here. The first label of a document is ignored: nothing in it predicts it.
    """

    def __init__(self, plan: PackPlan, shards: Sequence[TokenShards]):
        self.plan = plan
        self._shards = shards

    @classmethod
    def open(cls, packs: Path, tokens: Sequence[Sequence[Path]]) -> PackCollator:
        """tokens: each source's folders, in the order in which the plan numbers their rows."""
        return cls(PackPlan.read(packs), [TokenShards(*folders) for folders in tokens])

    @property
    def longest_document(self) -> int:
        return int(self.plan.num_tokens.max())

    @functools.cached_property
    def num_trained(self) -> np.ndarray:
        """Of each document of the plan: int64, shape (documents,). Reads every mask, once."""
        counts = np.zeros(len(self.plan.row), np.int64)
        for number, shards in enumerate(self._shards):
            here = self.plan.source == number
            counts[here] = shards.num_targets(self.plan.row[here], self.plan.num_tokens[here])
        return counts

    def __call__(self, slots: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        """input_ids, position_ids, labels, source: int64 tensors of shape (1, tokens); weights: float32."""
        offsets, packs = self.plan.offsets, [slot["pack"] for slot in slots]
        return self.of_documents(
            [entry for pack in packs if pack != EMPTY for entry in range(offsets[pack], offsets[pack + 1])]
        )

    def of_documents(self, entries: Iterable[int]) -> dict[str, torch.Tensor]:
        """The same of some of the plan's documents, by their numbers."""
        plan, documents = self.plan, []
        for entry in entries:
            source, length = int(plan.source[entry]), int(plan.num_tokens[entry])
            row = self._shards[source][int(plan.row[entry])]
            documents.append((row.first(length), source))
        return collate(documents)


def slot_alone(slots: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    """The number of a slot, where what is in it is not known when it is loaded: int64, shape (1,)."""
    return {"slot": torch.tensor([slot["pack"] for slot in slots])}


def collate(documents: list[tuple[TokenRow, int]]) -> dict[str, torch.Tensor]:
    """One sequence of documents with their source numbers; without any, two tokens that train nothing."""
    if not documents:
        documents = [(TokenRow(np.zeros(2, np.int32), np.zeros(2, np.uint8)), 0)]
    ids = np.concatenate([row.input_ids for row, _ in documents]).astype(np.int64)
    trained = np.concatenate([np.concatenate([[0], row.trained[1:]]) for row, _ in documents])
    lengths = [len(row.input_ids) for row, _ in documents]
    columns = {
        "input_ids": ids,
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        "labels": np.where(trained == 1, ids, IGNORED),
        "source": np.repeat([source for _, source in documents], lengths),
    }
    weights = np.concatenate([row.weights for row, _ in documents])
    batch = {name: torch.from_numpy(values.astype(np.int64))[None] for name, values in columns.items()}
    return {**batch, "weights": torch.from_numpy(np.where(trained == 1, weights, np.float32(0)))[None]}
