"""Packs as model inputs: concatenated documents, positions that restart at each, and the trained tokens.

All counts for the loss and the log are made here, on the CPU: reading a tensor's values on a GPU would make the host
wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, cast

import numpy as np
import torch

from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import TokenRow, TokenShards
from sft_core.train.schedule import EMPTY

# The inputs that mark the bounds of documents. positions: positions restart at 0 in each document. bounds: these and
# cu_seq_lens, for attention kernels of packed documents. sequences: all these and seq_idx, for recurrent layers.
DocumentInputs = Literal["positions", "bounds", "sequences"]

ModelInputs = dict[str, torch.Tensor | int]  # by the argument of the model's forward; int: lengths and booleans

# T tokens of D documents in P packs, N of them trained (the targets).


class Batch(TypedDict):
    """One forward. The arrays of numpy stay on the CPU when a batch moves to a device."""

    input_ids: torch.Tensor  # int64, (1, T)
    position_ids: torch.Tensor  # int64, (1, T): from 0 in each document
    bounds: torch.Tensor  # int32, (D + 1,): where documents begin, and the end
    seq_idx: torch.Tensor  # int32, (1, T): the number of a token's document
    targets: torch.Tensor  # int64, (N,): places of the trained tokens; never the first of a document
    target_ids: torch.Tensor  # int64, (N,)
    weights: torch.Tensor  # float32, (N,)
    source: torch.Tensor  # int64, (N,)
    document: torch.Tensor  # int64, (N,)
    entries: np.ndarray  # int64, (D,): the documents' numbers in the plan; empty without a plan, and without packs
    lengths: np.ndarray  # int64, (D,): tokens of each document
    num_targets: np.ndarray  # int64, (D,)
    pack_sizes: np.ndarray  # int64, (P,): documents of each pack; P is 0 if nothing is trained
    weight: NotRequired[float]  # the sum of all weights; absent in a part of a batch


class PackCollator:
    """Turns slots of the schedule into one sequence of their packs' documents.

    Gives no attention mask: transformers isolates documents only if positions restart at 0 and there is neither a mask
    nor a cache.
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
        """Trained tokens of each document of the plan: int64, shape (documents,). Reads every mask, once."""
        counts = np.zeros(len(self.plan.row), np.int64)
        for number, shards in enumerate(self._shards):
            here = self.plan.source == number
            counts[here] = shards.num_targets(self.plan.row[here], self.plan.num_tokens[here])
        return counts

    def __call__(self, slots: list[dict[str, int]]) -> Batch:
        offsets, packs = self.plan.offsets, [slot["pack"] for slot in slots]
        return self.of_packs([range(offsets[pack], offsets[pack + 1]) for pack in packs if pack != EMPTY])

    def of_packs(self, packs: Iterable[Iterable[int]]) -> Batch:
        """The batch of packs that are given by the numbers of their documents in the plan."""
        entries = [[int(entry) for entry in pack] for pack in packs]
        batch = collate(*([self._document(entry) for entry in pack] for pack in entries))
        batch["entries"] = np.array([entry for pack in entries for entry in pack], np.int64)
        return batch

    def _document(self, entry: int) -> tuple[TokenRow, int]:
        source, length = int(self.plan.source[entry]), int(self.plan.num_tokens[entry])
        return self._shards[source][int(self.plan.row[entry])].first(length), source


def slot_alone(slots: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    """The numbers of slots whose packs are drawn only after the loader reads them: int64, shape (slots,)."""
    return {"slot": torch.tensor([slot["pack"] for slot in slots])}


def collate(*packs: list[tuple[TokenRow, int]]) -> Batch:
    """One sequence of packs of documents, each with its source number; without packs two tokens that train nothing."""
    documents = [document for pack in packs for document in pack]
    pack_sizes = [len(pack) for pack in packs if pack]
    if not documents:
        documents = [(TokenRow(np.zeros(2, np.int32), np.zeros(2, np.uint8)), 0)]
    ids = np.concatenate([row.input_ids for row, _ in documents]).astype(np.int64)
    trained = np.concatenate([row.trained for row, _ in documents]) == 1
    lengths = np.array([len(row.input_ids) for row, _ in documents])
    ends = np.cumsum(lengths)
    trained[ends - lengths] = False  # nothing predicts a document's first token
    number = np.repeat(np.arange(len(documents)), lengths)
    targets = np.flatnonzero(trained)
    weights = np.concatenate([row.weights for row, _ in documents])[targets]
    places = {
        "input_ids": ids[None],
        "position_ids": (np.arange(len(ids)) - np.repeat(ends - lengths, lengths))[None],
        "bounds": np.concatenate([[0], ends]).astype(np.int32),
        "seq_idx": number.astype(np.int32)[None],
        "targets": targets,
        "target_ids": ids[targets],
        "weights": weights,
        "source": np.array([source for _, source in documents])[number[targets]],
        "document": number[targets],
    }
    counts = {
        "entries": np.empty(0, np.int64),
        "lengths": lengths,
        "num_targets": np.bincount(number[targets], minlength=len(documents)),
        "pack_sizes": np.array(pack_sizes, np.int64),
        "weight": float(weights.sum(dtype=np.float64)),
    }
    return cast(Batch, {**{name: torch.from_numpy(values) for name, values in places.items()}, **counts})


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on a device. The host does not wait for copies of pinned tensors."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    return cast(Batch, moved)


def model_inputs(batch: Batch, document_inputs: DocumentInputs, *, alone: bool = False) -> ModelInputs:
    """The arguments of a model's forward. use_cache is off: with a cache transformers lets documents see each other.

    alone: the batch is one document. Then the model counts positions itself: not every model begins at 0 (RoBERTa
    begins after the padding token's id).
    """
    inputs: ModelInputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if not alone:
        inputs["position_ids"] = batch["position_ids"]
    if document_inputs == "positions":
        return inputs
    bounds, longest = batch["bounds"], int(batch["lengths"].max())
    inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return inputs if document_inputs == "bounds" else inputs | {"seq_idx": batch["seq_idx"]}


def documents_alone(batch: Batch) -> Iterator[Batch]:
    """A separate batch for each document. Reads no values on the device."""
    starts, firsts = (np.concatenate([[0], np.cumsum(batch[name])]) for name in ("lengths", "num_targets"))
    for number in range(len(batch["lengths"])):
        tokens = slice(int(starts[number]), int(starts[number + 1]))
        mine = slice(int(firsts[number]), int(firsts[number + 1]))
        of_targets = {name: batch[name][mine] for name in ("target_ids", "weights", "source")}
        yield cast(
            Batch,
            {
                "input_ids": batch["input_ids"][:, tokens],
                "position_ids": batch["position_ids"][:, tokens],
                "bounds": batch["bounds"][number : number + 2] - tokens.start,
                "seq_idx": batch["seq_idx"][:, tokens] - number,
                "targets": batch["targets"][mine] - tokens.start,
                "document": batch["document"][mine] - number,
                **of_targets,
                "entries": batch["entries"][number : number + 1],
                "lengths": batch["lengths"][number : number + 1],
                "num_targets": batch["num_targets"][number : number + 1],
                "pack_sizes": np.ones(min(1, len(batch["pack_sizes"])), np.int64),
            },
        )
