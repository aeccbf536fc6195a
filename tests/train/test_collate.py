from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.packing.plan import PLAN
from sft_core.data.shards.token_shards import TOKENS, TokenRow
from sft_core.train.collate import Batch, PackCollator, collate, documents_alone
from sft_core.train.schedule import EMPTY

documents = st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=12), min_size=1)


def row(tokens: list[tuple[int, bool]]) -> TokenRow:
    return TokenRow(np.array([t for t, _ in tokens], np.int32), np.array([m for _, m in tokens], np.uint8))


def parts(batch: Batch) -> dict[str, list]:
    """Tensors as lists, those of one sequence without its dimension."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return {name: (value[0] if value.ndim == 2 else value).tolist() for name, value in tensors.items()}


@given(st.lists(documents, min_size=1, max_size=3))
def test_collate_keeps_order_positions_targets_and_counts(packs: list[list[list[tuple[int, bool]]]]) -> None:
    numbered = iter(range(1000))
    batch = collate(*([(row(document), next(numbered)) for document in pack] for pack in packs))
    found, tokens = parts(batch), [document for pack in packs for document in pack]
    ids = [token for document in tokens for token, _ in document]
    assert found["input_ids"] == ids
    assert found["position_ids"] == [position for document in tokens for position in range(len(document))]
    of_document = [i for i, document in enumerate(tokens) for _ in document]
    assert found["seq_idx"] == of_document
    trained = [trained and position > 0 for document in tokens for position, (_, trained) in enumerate(document)]
    targets = [place for place, is_trained in enumerate(trained) if is_trained]
    assert found["targets"] == targets
    assert found["target_ids"] == [ids[place] for place in targets]
    assert found["source"] == found["document"] == [of_document[place] for place in targets]
    assert found["bounds"] == [sum(map(len, tokens[:end])) for end in range(len(tokens) + 1)]
    assert batch["lengths"].tolist() == [len(document) for document in tokens]
    assert batch["num_targets"].tolist() == [found["document"].count(i) for i in range(len(tokens))]
    assert batch["pack_sizes"].tolist() == [len(pack) for pack in packs]
    assert batch["weight"] == len(targets)


@given(documents)
def test_documents_alone_are_the_batches_of_each(tokens: list[list[tuple[int, bool]]]) -> None:
    documents = [(row(document), i) for i, document in enumerate(tokens)]
    found = list(documents_alone(collate(documents)))
    assert len(found) == len(tokens)
    for part, document in zip(found, documents, strict=True):
        alone = collate([document])
        assert parts(part) == parts(alone)
        assert {**part}.keys() == {**alone}.keys() - {"weight"}
        assert all(part[name].tolist() == alone[name].tolist() for name in ("lengths", "num_targets", "pack_sizes"))


def test_collate_first_token_trained_is_no_target() -> None:
    batch = collate([(row([(5, True), (6, True)]), 0), (row([(7, True), (8, True)]), 0)])
    assert batch["target_ids"].tolist() == [6, 8] and batch["targets"].tolist() == [1, 3]


def test_weights_each_run_of_trained_tokens_has_its_own_also_in_a_truncated_row() -> None:
    tokens = [(1, False), (2, True), (3, True), (4, False), (5, True), (6, False), (7, True)]
    whole = TokenRow(row(tokens).input_ids, row(tokens).trained, np.array([0.25, 2.0, 1.0], np.float32))
    assert collate([(whole, 0)])["weights"].tolist() == [0.25, 0.25, 2, 1]
    assert collate([(whole, 0)])["weight"] == 3.5
    assert collate([(whole.first(5), 0)])["weights"].tolist() == [0.25, 0.25, 2]
    assert collate([(row(tokens), 0)])["weights"].tolist() == [1, 1, 1, 1]


def test_weights_first_token_of_a_document_counts_nothing() -> None:
    first = TokenRow(np.array([5, 6], np.int32), np.array([1, 1], np.uint8), np.array([0.5], np.float32))
    assert collate([(first, 0)])["weights"].tolist() == [0.5]


@pytest.fixture
def collator(tmp_path: Path) -> PackCollator:
    """Two sources, their first rows at weight 0.5. Pack 0: rows (0, 0) and (1, 1) cut to 2 tokens; pack 1: (0, 1)."""
    tokens = [
        [[(1, 0), (2, 1), (3, 1)], [(4, 0), (5, 1)]],
        [[(6, 1)], [(7, 0), (8, 1), (9, 1)]],
    ]
    for source, rows in enumerate(tokens):
        folder = tmp_path / f"tokens{source}" / "shard-00000"
        folder.mkdir(parents=True)
        columns = [[[pair[part] for pair in one] for one in rows] for part in (0, 1)] + [[[0.5], []]]
        with pa.OSFile(str(folder / "tokens.arrow"), "wb") as file, pa.ipc.new_file(file, TOKENS) as shard:
            arrays = [pa.array(values, field.type) for values, field in zip(columns, TOKENS, strict=True)]
            shard.write_batch(pa.record_batch(arrays, TOKENS))
    plan = {"pack": [0, 0, 1], "source": [0, 1, 0], "row": [0, 1, 1], "num_tokens": [3, 2, 2]}
    pq.write_table(pa.table(plan, schema=PLAN), tmp_path / "packs.parquet")
    return PackCollator.open(tmp_path, [[tmp_path / "tokens0"], [tmp_path / "tokens1"]])


def test_collator_pack_with_truncated_row_takes_its_first_tokens(collator: PackCollator) -> None:
    assert len(collator.plan) == 2
    batch = collator([{"pack": 0}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7, 8]]
    assert batch["target_ids"].tolist() == [2, 3, 8] and batch["targets"].tolist() == [1, 2, 4]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["source"].tolist() == [0, 0, 1]
    assert batch["weights"].tolist() == [0.5, 0.5, 1]


def test_collator_two_packs_are_one_sequence(collator: PackCollator) -> None:
    batch = collator([{"pack": 1}, {"pack": 0}])
    assert batch["input_ids"].tolist() == [[4, 5, 1, 2, 3, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    assert batch["pack_sizes"].tolist() == [1, 2]


def test_collator_empty_slot_trains_nothing(collator: PackCollator) -> None:
    batch = collator([{"pack": EMPTY}])
    assert batch["input_ids"].shape[1] >= 1  # a model cannot run on nothing
    assert len(batch["targets"]) == len(batch["pack_sizes"]) == 0 and batch["weight"] == 0
