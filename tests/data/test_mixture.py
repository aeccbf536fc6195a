"""The mixture: the handbook's weights, exact counts, and rows that stay when another source comes or goes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.mixture import build_mixture, sample_rows
from sft_core.data.shards import INDEX, read_index
from sft_core.data.splits import TRAIN, assign
from sft_core.recipe import Runtime
from sft_core.store import Build
from steps.mix import MIXTURE
from steps.tokenize import TOKENS

Mix = Callable[..., tuple[pa.Table, dict[str, Any]]]


def source(rows: int, weight: float | None = None, num_rows: int | None = None, untrained: int = 0) -> dict[str, Any]:
    return {"rows": rows, "weight": weight, "num_rows": num_rows, "untrained": untrained}


def hashes(num_rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, num_rows, dtype=np.uint64)


@pytest.fixture
def mix(tmp_path: Path) -> Mix:
    """The mixture of sources made of so many rows, and its counts: of a row, only its index entry matters here."""

    def make(seed: int = 0, report_share: float = 0.0, **sources: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
        inputs = {}
        for name, options in sources.items():
            num_rows = options["rows"]
            columns = {
                "row_id": [str(row) for row in range(num_rows)],
                "prompt_hash": hashes(num_rows),
                "answer": [None] * num_rows,
                "num_tokens": np.arange(num_rows) + 10,
                "num_trained": np.where(np.arange(num_rows) < options["untrained"], 0, 4),
            }
            inputs[name] = tmp_path / name
            inputs[name].mkdir(exist_ok=True)
            pq.write_table(pa.table(columns, schema=INDEX), inputs[name] / "index.parquet")
        listed = [{"name": name, **{key: o[key] for key in ("weight", "num_rows")}} for name, o in sources.items()]
        build = Build(tmp_path, inputs, Runtime())
        counts = build_mixture(build, sources=listed, selection_share=0.0, report_share=report_share, seed=seed)
        return pq.read_table(tmp_path / "mixture.parquet"), counts

    return make


def rows_of(mixture: pa.Table, number: int) -> list[int]:
    chosen = mixture["source"].to_numpy() == number
    return sorted(mixture["row"].to_numpy()[chosen].tolist())


@pytest.mark.parametrize(
    ("weight", "kept"),
    [(None, 37), (1.0, 37), (0.5, 18), (0.1, 3), (0.99, 36), (2.0, 74), (2.5, 92), (1 / 37, 1)],
)
def test_weight_keeps_a_floored_share_and_whole_copies_over_one(mix: Mix, weight: float | None, kept: int):
    mixture, counts = mix(a=source(37, weight=weight))
    assert counts["sources"]["a"]["kept"] == counts["rows"] == len(mixture) == kept
    times = np.bincount(rows_of(mixture, 0), minlength=37)
    assert times.sum() == kept
    assert times.max() - times.min() <= 1


@pytest.mark.parametrize("num_rows", [1, 5, 37, 40, 100])
def test_num_rows_keeps_exactly_as_many(mix: Mix, num_rows: int):
    mixture, _ = mix(a=source(37, num_rows=num_rows))
    times = np.bincount(rows_of(mixture, 0), minlength=37)
    assert times.sum() == num_rows
    assert times.max() - times.min() <= 1


def test_weight_zero_excludes_without_a_warning(mix: Mix, caplog: pytest.LogCaptureFixture):
    mixture, counts = mix(a=source(5, weight=0.0), b=source(5))
    assert rows_of(mixture, 0) == []
    assert rows_of(mixture, 1) == [0, 1, 2, 3, 4]
    assert counts["sources"]["a"]["kept"] == 0
    assert caplog.records == []


def test_weight_that_floors_to_zero_is_a_loud_warning(mix: Mix, caplog: pytest.LogCaptureFixture):
    mix(small=source(9, weight=0.1), b=source(5))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == ["source=small keeps 0 of 9 training rows; raise its weight"]


def test_mixture_of_no_rows_is_an_error(mix: Mix):
    with pytest.raises(ValueError, match="dataset_mixture: keeps 0 rows of 2 sources; raise a weight or add data"):
        mix(a=source(9, weight=0.1), b=source(5, weight=0.0))


def test_rows_without_a_trained_token_are_left_out_and_counted(mix: Mix):
    mixture, counts = mix(a=source(10, untrained=4, weight=0.5))
    assert counts["sources"]["a"]["without_trained_token"] == 4
    assert counts["sources"]["a"]["kept"] == len(mixture) == 3
    assert min(rows_of(mixture, 0)) >= 4


def test_source_without_rows_to_train_on_keeps_none_and_warns(mix: Mix, caplog: pytest.LogCaptureFixture):
    _, counts = mix(a=source(4, untrained=4, num_rows=3), b=source(3))
    assert counts["sources"]["a"]["kept"] == 0
    assert "source=a keeps 0 of 0" in caplog.text


def test_held_out_rows_are_never_in_the_mixture_and_the_counts_add_up(mix: Mix):
    mixture, counts = mix(report_share=0.3, a=source(500, weight=2.0))
    in_train = assign(hashes(500), selection_share=0.0, report_share=0.3) == TRAIN
    found = counts["sources"]["a"]
    assert found["train"] + found["selection"] + found["report"] == found["rows"] == 500
    assert found["report"] > 100
    assert set(rows_of(mixture, 0)) == set(np.flatnonzero(in_train))
    assert found["kept"] == 2 * found["train"]


def test_table_tokens_are_those_of_the_rows_and_the_counts_are_their_sums(mix: Mix):
    mixture, counts = mix(a=source(20, weight=0.5), b=source(30))
    assert (mixture["num_tokens"].to_numpy() == mixture["row"].to_numpy() + 10).all()
    assert counts["tokens"] == mixture["num_tokens"].to_numpy().sum()
    assert sum(one["tokens"] for one in counts["sources"].values()) == counts["tokens"]
    assert sum(one["trained_tokens"] for one in counts["sources"].values()) == 4 * len(mixture)


def test_table_is_shuffled_over_sources(mix: Mix):
    mixture, _ = mix(a=source(100), b=source(100))
    assert 30 < (mixture["source"].to_numpy()[:100] == 0).sum() < 70


def test_one_more_source_leaves_the_rows_of_the_others(mix: Mix):
    before, _ = mix(a=source(200, weight=0.3), b=source(100, num_rows=40))
    after, _ = mix(new=source(50, weight=0.5), b=source(100, num_rows=40), a=source(200, weight=0.3))
    assert len(rows_of(before, 0)) == 60
    assert rows_of(before, 0) == rows_of(after, 2)
    assert rows_of(before, 1) == rows_of(after, 1)


def test_another_weight_of_one_source_leaves_the_rows_of_the_others(mix: Mix):
    before, _ = mix(a=source(200, weight=0.3), b=source(100, weight=0.2))
    after, _ = mix(a=source(200, weight=0.3), b=source(100, weight=0.9))
    assert rows_of(before, 0) == rows_of(after, 0)
    assert set(rows_of(before, 1)) < set(rows_of(after, 1))


def test_seed_same_gives_the_same_table_and_another_gives_other_rows(mix: Mix):
    sources = {"a": source(200, weight=0.3), "b": source(200, weight=0.3)}
    first, again, other = mix(**sources)[0], mix(**sources)[0], mix(seed=1, **sources)[0]
    assert first.equals(again)
    assert rows_of(first, 0) != rows_of(other, 0)
    assert rows_of(first, 0) != rows_of(first, 1), "two sources of one size draw the same rows"


@given(st.integers(0, 300), st.floats(0, 5), st.integers(0, 3))
def test_sample_any_weight_keeps_its_floor_evenly(num_available: int, weight: float, seed: int):
    rows = sample_rows(num_available, weight=weight, num_rows=None, rng=np.random.default_rng(seed))
    assert rows.dtype == np.int64
    assert len(rows) == int(num_available * weight)
    if num_available:
        times = np.bincount(rows, minlength=num_available)
        assert len(times) == num_available
        assert times.max() - times.min() <= 1


@given(st.integers(1, 300), st.integers(1, 1000), st.integers(0, 3))
def test_sample_any_count_is_exact_and_a_larger_one_only_adds(num_available: int, num_rows: int, seed: int):
    fewer, more = (
        sample_rows(num_available, weight=None, num_rows=count, rng=np.random.default_rng(seed))
        for count in (num_rows, num_rows + 1)
    )
    assert len(fewer) == num_rows
    added = np.bincount(more, minlength=num_available) - np.bincount(fewer, minlength=num_available)
    assert added.min() >= 0
    assert added.sum() == 1


def test_stage_another_weight_builds_a_mixture_and_no_token(write_rows, pinned, ensure, tmp_path: Path):
    answer = {"role": "assistant", "content": "Hi."}
    sources = []
    for tag in ("a", "b"):
        rows = [{"messages": [{"role": "user", "content": f"{tag} {n}"}, answer]} for n in range(200)]
        sources.append({"path": str(write_rows(f"{tag}.jsonl", rows))})

    def recipe(weight: float) -> Any:
        shares = {"report_share": 0.2, "selection_share": 0.1}
        return pinned(sources[0], sources[1] | {"weight": weight}, mixture=shares)

    folder, manifest = ensure(MIXTURE, recipe(0.25))
    counts = manifest["counts"]["sources"]
    assert list(counts) == ["a", "b"]
    assert counts["a"]["kept"] == counts["a"]["train"]
    assert counts["b"]["kept"] == int(counts["b"]["train"] * 0.25)
    assert 20 < counts["a"]["report"] < 60
    index = read_index(ensure(TOKENS, recipe(0.25), source="b")[0])
    rows = [row for row in pq.read_table(folder / "mixture.parquet").to_pylist() if row["source"] == 1]
    assert rows
    assert all(row["num_tokens"] == index["num_tokens"][row["row"]].as_py() for row in rows)

    ensure(MIXTURE, recipe(2.0))
    built = [json.loads(line)["stage"] for line in (tmp_path / "store" / "builds.jsonl").read_text().splitlines()]
    assert sorted(built) == sorted(["conversations", "rendered", "tokens"] * 2 + ["mixture"] * 2)
