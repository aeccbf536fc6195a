from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.packing import PLAN
from sft_core.data.shards import TOKENS, TokenRow
from sft_core.train.collate import IGNORED, PackCollator, collate
from sft_core.train.schedule import EMPTY

documents = st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=12), min_size=1)


def row(tokens: list[tuple[int, bool]]) -> TokenRow:
    return TokenRow(np.array([t for t, _ in tokens], np.int32), np.array([m for _, m in tokens], np.uint8))


@given(documents)
def test_collate_documents_keeps_order_positions_and_labels(tokens: list[list[tuple[int, bool]]]) -> None:
    batch = {name: values[0].tolist() for name, values in collate([(row(d), i) for i, d in enumerate(tokens)]).items()}
    assert batch["input_ids"] == [token for document in tokens for token, _ in document]
    assert batch["position_ids"] == [position for document in tokens for position in range(len(document))]
    assert batch["source"] == [i for i, document in enumerate(tokens) for _ in document]
    assert batch["labels"] == [
        token if trained and position else IGNORED
        for document in tokens
        for position, (token, trained) in enumerate(document)
    ]


def test_collate_first_token_trained_is_ignored() -> None:
    batch = collate([(row([(5, True), (6, True)]), 0), (row([(7, True), (8, True)]), 0)])
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED, 8]]


def test_weights_each_run_of_trained_tokens_has_its_own_also_in_a_truncated_row() -> None:
    tokens = [(1, False), (2, True), (3, True), (4, False), (5, True), (6, False), (7, True)]
    whole = TokenRow(row(tokens).input_ids, row(tokens).trained, np.array([0.25, 2.0, 1.0], np.float32))
    assert collate([(whole, 0)])["weights"].tolist() == [[0, 0.25, 0.25, 0, 2, 0, 1]]
    assert collate([(whole.first(5), 0)])["weights"].tolist() == [[0, 0.25, 0.25, 0, 2]]
    assert collate([(row(tokens), 0)])["weights"].tolist() == [[0, 1, 1, 0, 1, 0, 1]]


def test_weights_first_token_of_a_document_counts_nothing() -> None:
    first = TokenRow(np.array([5, 6], np.int32), np.array([1, 1], np.uint8), np.array([0.5], np.float32))
    assert collate([(first, 0)])["weights"].tolist() == [[0, 0.5]]


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
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["source"].tolist() == [[0, 0, 0, 1, 1]]
    assert batch["weights"].tolist() == [[0, 0.5, 0.5, 0, 1]]


def test_collator_two_packs_are_one_sequence(collator: PackCollator) -> None:
    batch = collator([{"pack": 1}, {"pack": 0}])
    assert batch["input_ids"].tolist() == [[4, 5, 1, 2, 3, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1]]


def test_collator_empty_slot_trains_nothing(collator: PackCollator) -> None:
    batch = collator([{"pack": EMPTY}])
    assert batch["input_ids"].shape[1] >= 2  # a model cannot run on nothing, nor TRL's shifted labels on one token
    assert (batch["labels"] == IGNORED).all()
