"""Packing: each sequence in exactly one pack, none over capacity, and every over-long row accounted for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import martello_toth_l2, reasoning_lengths
from sft_core.data.mixing.mixture import MIXTURE
from sft_core.data.packing.over_long import truncated_length
from sft_core.data.packing.plan import PackPlan, build_packs, first_fit_decreasing
from sft_core.data.shards.token_shards import TOKENS, TokenShards
from sft_core.recipe.sections import Runtime
from sft_core.store.stage import Build
from steps.pack import PACKED
from steps.tokenize import TOKENS as TOKENS_STAGE


def naive(lengths: list[int], capacity: int) -> list[int]:
    """First-fit-decreasing by its definition."""
    pack, free = [-1] * len(lengths), list[int]()
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        first = next((number for number, room in enumerate(free) if room >= lengths[index]), None)
        if first is None:
            first = len(free)
            free.append(capacity)
        free[first] -= lengths[index]
        pack[index] = first
    return pack


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80)), capacity


@settings(max_examples=300, deadline=None)
@given(lengths_and_capacity())
def test_first_fit_decreasing_is_that_of_its_definition(drawn):
    lengths, capacity = drawn
    pack = first_fit_decreasing(np.array(lengths, dtype=np.int32), capacity)
    assert pack.dtype == np.int64
    assert pack.tolist() == naive(lengths, capacity)
    filled = np.bincount(pack, weights=lengths)
    assert filled.min() > 0
    assert filled.max() <= capacity
    # Two packs that are at most half full would have been one.
    assert (filled <= capacity / 2).sum() <= 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40_000), st.integers(0, 400), st.floats(0.05, 1), st.integers(0, 2**32))
def test_first_fit_decreasing_of_long_rows_is_that_of_its_definition(capacity: int, num: int, most: float, seed: int):
    lengths = np.random.default_rng(seed).integers(1, max(2, int(capacity * most) + 1), num)
    assert first_fit_decreasing(lengths, capacity).tolist() == naive(lengths.tolist(), capacity)


@pytest.mark.parametrize(
    ("lengths", "capacity"),
    [
        ([], 10),
        ([10] * 33, 10),  # as many packs as rows
        ([6] * 33, 10),  # the same, each hardly over half full
        ([5] * 33, 10),
        ([4] * 33, 10),
        ([1] * 33, 10),
        ([1] * 33, 1),
        ([6, 1] * 16, 10),
        ([1] * 33, 2**31 - 1),
        ([1_000_000, 1, 999_999, 500_000, 500_001, 1], 1_000_000),
    ],
)
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_first_fit_decreasing_at_the_edges_is_that_of_its_definition(lengths: list[int], capacity: int, dtype: type):
    pack = first_fit_decreasing(np.array(lengths, dtype=dtype), capacity)
    assert pack.tolist() == naive(lengths, capacity)


def test_first_fit_decreasing_of_a_column_leaves_it_alone():
    table = np.arange(1, 31).reshape(10, 3)
    column = table[:, 1]
    assert first_fit_decreasing(column, 40).tolist() == naive(column.tolist(), 40)
    assert (table == np.arange(1, 31).reshape(10, 3)).all()


def test_first_fit_decreasing_rows_of_reasoning_leaves_next_to_nothing_empty():
    lengths = reasoning_lengths(300_000, 65_536, seed=0)
    num_packs = first_fit_decreasing(lengths, 65_536).max() + 1
    assert num_packs <= 1.0001 * -(-int(lengths.sum()) // 65_536)
    short = lengths[lengths <= 8_192]
    assert len(short) > 200_000
    num_packs = first_fit_decreasing(short, 8_192).max() + 1
    assert num_packs <= 1.0005 * martello_toth_l2(short, 8_192)


@given(lengths_and_capacity())
def test_martello_toth_l2_is_that_of_its_definition(drawn):
    lengths, capacity = drawn
    bounds = []
    for k in range(capacity // 2 + 1):
        alone = [length for length in lengths if length > capacity - k]
        large = [length for length in lengths if capacity - k >= length > capacity / 2]
        small = [length for length in lengths if capacity / 2 >= length >= k]
        further = sum(small) - (len(large) * capacity - sum(large))
        bounds.append(len(alone) + len(large) + max(0, -(-further // capacity)))
    assert martello_toth_l2(np.array(lengths), capacity) == max(bounds) <= max(naive(lengths, capacity)) + 1


@pytest.mark.parametrize("lengths", [[0], [5, 11], [-1]])
def test_first_fit_decreasing_refuses_lengths_that_cannot_be_packed(lengths: list[int]):
    with pytest.raises(ValueError, match=r"each is 1 to 10"):
        first_fit_decreasing(np.array(lengths), 10)


@pytest.mark.parametrize("capacity", [0, -1, 2**31])
def test_first_fit_decreasing_refuses_a_capacity_beyond_32_bits(capacity: int):
    with pytest.raises(ValueError, match=rf"capacity: found {capacity}; it is 1 to 2147483647"):
        first_fit_decreasing(np.array([1]), capacity)


# A cut between turns. P is a prompt's token, T a trained one.


@pytest.mark.parametrize(
    ("row", "max_length", "kept"),
    [
        ("PPTTPPTTP", 8, 8),
        ("PPTTPPTTP", 7, 4),
        ("PPTTPPTTP", 4, 4),
        ("PPTTPPTTP", 3, 0),
        ("PPTTPPTT", 7, 4),
        ("PPPP", 3, 0),
        ("TTPP", 2, 2),
        ("TTTT", 3, 0),
    ],
)
def test_truncated_length_is_the_end_of_the_last_whole_turn(row: str, max_length: int, kept: int):
    trained = np.array([token == "T" for token in row], dtype=np.uint8)
    assert truncated_length(trained, max_length, whole_turns=True) == kept
    assert truncated_length(trained, max_length, whole_turns=False) == max_length


@given(st.lists(st.booleans(), min_size=2, max_size=40), st.data())
def test_truncated_length_of_any_row_fits_and_ends_where_a_turn_ends(mask: list[bool], data: st.DataObject):
    max_length = data.draw(st.integers(1, len(mask) - 1))
    length = truncated_length(np.array(mask, dtype=np.uint8), max_length, whole_turns=True)
    ends = [end for end in range(1, len(mask)) if mask[end - 1] and not mask[end]]
    assert length == max((end for end in ends if end <= max_length), default=0)


# The plan


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., tuple[PackPlan, dict[str, Any]]]:
    """The plan and counts of a mixture of all rows of the sources, each row given by its mask."""

    def make(max_length: int, over_long: str = "drop", **options: Any) -> tuple[PackPlan, dict[str, Any]]:
        default = {"packing_strategy": "ffd", "loss_scope": "assistant"}
        settings = {key: options.pop(key, value) for key, value in default.items()}
        inputs, entries = {"mixture": tmp_path}, []
        for number, (name, rows) in enumerate(options.items()):
            inputs[name] = tmp_path / name
            shard = inputs[name] / "shard-00000"
            shard.mkdir(parents=True, exist_ok=True)
            masks = [[int(token == "T") for token in row] for row in rows]
            lists = (masks, masks, [[]] * len(masks))
            columns = [pa.array(values, field.type) for values, field in zip(lists, TOKENS, strict=True)]
            batch = pa.record_batch(columns, schema=TOKENS)
            with pa.ipc.new_file(str(shard / "tokens.arrow"), TOKENS) as file:
                file.write_batch(batch)
            entries += [(number, row, len(mask), sum(mask)) for row, mask in enumerate(masks)]
        columns = [pa.array(column) for column in zip(*entries, strict=True)]
        pq.write_table(pa.table(columns, names=MIXTURE.names).cast(MIXTURE), tmp_path / "mixture.parquet")
        build = Build(tmp_path, inputs, Runtime())
        counts = build_packs(build, sources=list(options), max_length=max_length, over_long=over_long, **settings)
        return PackPlan.read(tmp_path), counts

    return make


def documents(plan: PackPlan) -> list[tuple[int, int, int]]:
    return sorted(zip(plan.source.tolist(), plan.row.tolist(), plan.num_tokens.tolist(), strict=True))


def fills(plan: PackPlan) -> list[int]:
    return [int(plan.num_tokens[a:b].sum()) for a, b in zip(plan.offsets, plan.offsets[1:], strict=False)]


FITS = "PPTTP"
LONG = "PPTTPPTTP"
HOPELESS = "PPPPPTTP"


def test_plan_each_row_is_in_one_pack_of_the_whole_mixture(pack):
    plan, counts = pack(10, a=[FITS, "PT", LONG], b=[FITS, "PPT"])
    assert documents(plan) == [(0, 0, 5), (0, 1, 2), (0, 2, 9), (1, 0, 5), (1, 1, 3)]
    assert fills(plan) == [9, 10, 5]
    assert counts == {
        "packs": 3,
        "documents": 5,
        "tokens": 24,
        "max_length": 10,
        "fill": 0.8,
        "packs_by_fill": {"50": 1, "90": 1, "100": 1},
        "packs_by_documents": {"1": 1, "2": 2},
        "documents_by_tokens": {"2": 1, "3": 1, "5": 2, "8": 1},  # 8 and 9 share a bin
        "attention_of_packs": {"least": 3 + 6, "mean": 28, "most": 45},
        "dropped": {},
        "truncated": {},
        "split": {},
        "windows": {},
    }


def test_plan_strategy_none_is_a_pack_for_each_row(pack):
    plan, counts = pack(10, packing_strategy="none", a=[FITS, "PT", LONG], b=[FITS])
    assert fills(plan) == [5, 2, 9, 5]
    assert counts["packs"] == counts["documents"] == len(plan) == 4


def test_over_long_drop_counts_by_source(pack, caplog):
    plan, counts = pack(6, a=[FITS, LONG], b=[LONG, HOPELESS, FITS], c=[FITS])
    assert documents(plan) == [(0, 0, 5), (1, 2, 5), (2, 0, 5)]
    assert counts["dropped"] == {"a": 1, "b": 2}
    assert counts["truncated"] == {}
    assert "over_long=drop rows=3 dropped=3 max_length=6" in caplog.text


def test_over_long_truncate_cuts_after_a_whole_turn_and_drops_when_none_fits(pack):
    plan, counts = pack(6, "truncate", a=[FITS, LONG], b=[LONG, HOPELESS, FITS], c=[FITS])
    assert documents(plan) == [(0, 0, 5), (0, 1, 4), (1, 0, 4), (1, 2, 5), (2, 0, 5)]
    assert counts["dropped"] == {"b": 1}
    assert counts["truncated"] == {"a": 1, "b": 1}
    assert counts["tokens"] == sum(fills(plan)) == 23


def test_over_long_truncate_with_every_token_trained_cuts_at_max_length(pack):
    plan, counts = pack(6, "truncate", loss_scope="all", a=["TTTTTTTTT", "TTT"])
    assert documents(plan) == [(0, 0, 6), (0, 1, 3)]
    assert counts["truncated"] == {"a": 1}


def test_over_long_error_names_the_worst_row_and_what_to_do(pack):
    with pytest.raises(ValueError, match=r"packing.max_length: found 7; 2 rows are longer") as error:
        pack(7, "error", a=[FITS, HOPELESS], b=[FITS, FITS, LONG])
    assert "the longest has 9 tokens (source b, row 2)" in str(error.value)
    assert "set packing.over_long to drop, truncate or split" in str(error.value)
    assert pack(9, "error", a=[FITS, HOPELESS], b=[LONG])[1]["documents"] == 3


@pytest.mark.parametrize("over_long", ["drop", "truncate"])
def test_max_length_under_the_shortest_row_names_both(pack, over_long: str):
    with pytest.raises(ValueError, match=r"found 3; no row is left \(the shortest has 5 tokens\); raise it"):
        pack(3, over_long, a=[FITS, LONG], b=[HOPELESS])


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=30), max_length=st.integers(2, 30))
def test_plan_of_any_mixture_holds_every_row_or_counts_it(tmp_path_factory, lengths: list[int], max_length: int):
    folder = tmp_path_factory.mktemp("plan")
    half = len(lengths) // 2
    number, row = [0] * half + [1] * (len(lengths) - half), [*range(half), *range(len(lengths) - half)]
    columns = [pa.array(column) for column in (number, row, lengths, [1] * len(lengths))]
    pq.write_table(pa.table(columns, names=MIXTURE.names).cast(MIXTURE), folder / "mixture.parquet")
    build = Build(folder, {"mixture": folder}, Runtime())
    options = {"sources": ["a", "b"], "packing_strategy": "ffd", "max_length": max_length, "loss_scope": "assistant"}
    fitting = [index for index, length in enumerate(lengths) if length <= max_length]
    if not fitting:
        with pytest.raises(ValueError, match=f"found {max_length}; no row is left .the shortest has {min(lengths)} "):
            build_packs(build, over_long="drop", **options)
        return
    counts = build_packs(build, over_long="drop", **options)
    plan = PackPlan.read(folder)
    assert documents(plan) == sorted((number[index], row[index], lengths[index]) for index in fitting)
    assert max(fills(plan)) <= max_length
    assert sum(fills(plan)) == counts["tokens"]
    assert len(plan) == max(naive([lengths[index] for index in fitting], max_length)) + 1
    assert counts["documents"] + sum(counts["dropped"].values()) == len(lengths)
    of = {"packs_by_fill": "packs", "packs_by_documents": "packs", "documents_by_tokens": "documents"}
    assert {name: sum(counts[name].values()) for name in of} == {name: counts[what] for name, what in of.items()}


def test_stage_truncated_document_ends_with_the_stop_token(write_rows, pinned, ensure, quickstart):
    turns = [{"role": role, "content": f"{role} says this"} for role in ("user", "assistant")]
    source = {"name": "s", "path": str(write_rows("a.jsonl", [{"messages": turns}, {"messages": turns * 3}]))}
    recipe = pinned(source, packing={"max_length": 90, "over_long": "truncate"})
    folder, manifest = ensure(PACKED, recipe)
    assert manifest["counts"]["truncated"] == {"s": 1}
    plan = PackPlan.read(folder)
    assert sorted(plan.row.tolist()) == [0, 1]
    (cut,) = plan.num_tokens[plan.row == 1].tolist()
    document = TokenShards(ensure(TOKENS_STAGE, recipe, source="s")[0])[1]
    assert cut <= 90 < len(document.input_ids)
    assert quickstart.decode(document.input_ids[:cut]).endswith("assistant says this<|im_end|>")
    assert document.trained[:cut].any()
