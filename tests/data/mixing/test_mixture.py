"""The mixture: the handbook's weights, exact counts, and rows that stay when another source comes or goes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.mixing.mixture import build_mixture, sample_rows
from sft_core.data.mixing.mixture_counts import AMOUNTS
from sft_core.data.mixing.shares import draw_tokens, fill
from sft_core.data.shards.token_shards import INDEX, read_index
from sft_core.data.sources.splits import TRAIN, assign
from sft_core.data.tokens.lengths import by_length
from sft_core.recipe.sections import Runtime
from sft_core.store.stage import Build
from steps.mix import MIXTURE
from steps.tokenize import TOKENS

Mix = Callable[..., tuple[pa.Table, dict[str, Any]]]


ASKED = ("weight", "num_rows", "trained_token_share")


def source(rows: int, untrained: int = 0, trained: Any = 4, **asked: float) -> dict[str, Any]:
    """trained: how many tokens each row trains, or each of them."""
    return {"rows": rows, "untrained": untrained, "trained": trained, **{key: asked.get(key) for key in ASKED}}


def hashes(num_rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, num_rows, dtype=np.uint64)


@pytest.fixture
def mix(tmp_path: Path) -> Mix:
    """The mixture of sources made of so many rows, and its counts: of a row, only its index entry matters here."""

    def make(
        seed: int = 0,
        report_share: float = 0.0,
        num_trained_tokens: int | None = None,
        max_repeats: float | None = None,
        **sources: dict[str, Any],
    ) -> tuple[pa.Table, dict[str, Any]]:
        inputs, manifests = {}, {}
        for name, options in sources.items():
            manifests[name] = {"counts": {"source": {"rows": options["rows"] + 1, "rejected": {"download": {"x": 1}}}}}
            num_rows = options["rows"]
            columns = {
                "row_id": [str(row) for row in range(num_rows)],
                "prompt_hash": hashes(num_rows),
                "answer": [None] * num_rows,
                "num_tokens": np.arange(num_rows) + 10,
                "num_trained": np.where(np.arange(num_rows) < options["untrained"], 0, options["trained"]),
            }
            inputs[name] = tmp_path / name
            (inputs[name] / "shard-00000").mkdir(exist_ok=True, parents=True)
            pq.write_table(pa.table(columns, schema=INDEX), inputs[name] / "shard-00000" / "index.parquet")
        counts = build_mixture(
            Build(tmp_path, inputs, Runtime(), manifests=manifests),
            sources=[{"name": name, **{key: options[key] for key in ASKED}} for name, options in sources.items()],
            selection_share=0.0,
            report_share=report_share,
            seed=seed,
            num_trained_tokens=num_trained_tokens,
            max_repeats=max_repeats,
        )
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


def test_counts_tell_lengths_of_the_rows_that_are_kept_and_what_was_rejected_before(mix: Mix):
    mixture, counts = mix(a=source(37, weight=2.0, untrained=7), b=source(3, trained=9))
    one, other = counts["sources"].values()
    kept = mixture.filter(pc.equal(mixture["source"], 0))
    assert one["rows_by_tokens"] == by_length(kept["num_tokens"].to_numpy()) and len(one["rows_by_tokens"]) > 4
    assert one["rows_by_trained_tokens"] == {"4": 60} and other["rows_by_trained_tokens"] == {"8": 3}
    assert (one["rows_read"], one["rejected"]) == (38, {"download": {"x": 1}})


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
    assert found["available"] == found["train"] == len(np.flatnonzero(in_train))
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


# Shares of trained tokens


def shared(rows: int, share: float, **options: Any) -> dict[str, Any]:
    return source(rows, trained_token_share=share, **options)


def test_shares_are_of_trained_tokens_not_of_rows(mix: Mix):
    _, counts = mix(max_repeats=4.0, a=shared(100, 1, trained=40), b=shared(1000, 3, trained=8))
    a, b = counts["sources"].values()
    assert counts["budget"]["num_trained_tokens"] == 100 * 40 + 1000 * 8, "default: what they hold once"
    assert a["trained_tokens"] == 3000 and b["trained_tokens"] == 9000
    assert a["kept"] == 75 and b["kept"] == 1125
    assert a["requested"]["trained_tokens"] == a["achieved"]["trained_tokens"] == 0.25
    assert a["repeats"] == 0.75 and b["repeats"] == 1.125
    assert counts["budget"]["held_at_max_repeats"] == []


def test_share_budget_given_is_met_and_a_share_of_zero_leaves_out(mix: Mix, caplog: pytest.LogCaptureFixture):
    sources = {"a": shared(100, 0.5), "b": shared(100, 0), "c": shared(100, 0.5)}
    mixture, counts = mix(max_repeats=4.0, num_trained_tokens=200, **sources)
    assert [one["kept"] for one in counts["sources"].values()] == [25, 0, 25]
    assert counts["trained_tokens"] == 200 == mixture["num_trained"].to_numpy().sum()
    assert mix(max_repeats=4.0, **sources)[1]["trained_tokens"] == 800, "b is no part of the default budget"
    assert caplog.records == []


def test_share_over_the_cap_is_held_there_and_the_others_have_the_rest(mix: Mix, caplog: pytest.LogCaptureFixture):
    sources = {"small": shared(10, 8), "b": shared(1000, 1), "c": shared(1000, 1)}
    mixture, counts = mix(max_repeats=4.0, **sources)
    small, b, c = counts["sources"].values()
    assert small["repeats"] == 4.0 and np.bincount(rows_of(mixture, 0)).tolist() == [4] * 10
    assert b["trained_tokens"] == c["trained_tokens"] == (8040 - 160) / 2
    assert small["requested"]["trained_tokens"] == 0.8 and small["achieved"]["trained_tokens"] == 160 / 8040
    assert counts["budget"]["held_at_max_repeats"] == ["small"]
    assert caplog.messages == ["source=small is held at max_repeats 4: 2.0% of trained tokens instead of 80.0%"]


def test_share_budget_out_of_reach_is_told_loudly(mix: Mix, caplog: pytest.LogCaptureFixture):
    _, counts = mix(max_repeats=2.0, num_trained_tokens=10_000, a=shared(100, 1), b=shared(200, 1))
    assert counts["trained_tokens"] == counts["budget"]["within_reach"] == 2 * 300 * 4
    assert counts["budget"]["num_trained_tokens"] == 10_000
    assert caplog.messages[-1] == (
        "dataset_mixture.num_trained_tokens: found 10000; at max_repeats 2 the sources give 2400; "
        "add data or raise max_repeats"
    )
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_share_of_a_source_without_rows_goes_to_the_others(mix: Mix, caplog: pytest.LogCaptureFixture):
    _, counts = mix(max_repeats=4.0, num_trained_tokens=80, a=shared(5, 1, untrained=5), b=shared(50, 1))
    assert [one["trained_tokens"] for one in counts["sources"].values()] == [0, 80]
    assert "source=a keeps 0 of 0 training rows; add data" in caplog.text


def test_max_repeats_does_not_touch_a_weight(mix: Mix):
    assert mix(a=source(10, weight=9.0))[1]["sources"]["a"]["repeats"] == 9.0


def test_requested_and_achieved_are_told_of_rows_tokens_and_trained_tokens(mix: Mix):
    _, counts = mix(a=source(100, weight=0.5, trained=10), b=source(100, trained=2), c=source(40, num_rows=20))
    a, b, c = counts["sources"].values()
    assert [one["requested"]["rows"] for one in (a, b, c)] == [50 / 170, 100 / 170, 20 / 170]
    assert [one["requested"]["trained_tokens"] for one in (a, b, c)] == [500 / 780, 200 / 780, 80 / 780]
    for kind in ("requested", "achieved"):
        for amount in AMOUNTS:
            assert sum(one[kind][amount] for one in (a, b, c)) == pytest.approx(1)
    assert a["achieved"]["rows"] == 50 / 170
    assert a["achieved"]["tokens"] == a["tokens"] / counts["tokens"]


def test_one_more_source_with_a_share_only_cuts_the_others_shorter(mix: Mix):
    trained = np.random.default_rng(1).integers(1, 50, 300)
    a = shared(300, 1, trained=trained)
    before, _ = mix(max_repeats=4.0, num_trained_tokens=4000, a=a, b=shared(500, 1))
    after, _ = mix(max_repeats=4.0, num_trained_tokens=4000, new=shared(500, 1), a=a, b=shared(500, 1))
    assert 50 < len(rows_of(after, 1)) < len(rows_of(before, 0))
    assert set(rows_of(after, 1)) < set(rows_of(before, 0))


sizes = st.lists(st.integers(1, 2000), min_size=1, max_size=40)


@given(sizes, st.floats(0, 5), st.sampled_from([0.5, 1.0, 2.5, 4.0]), st.integers(0, 3))
def test_draw_any_target_is_met_within_a_row_and_the_cap_holds(
    trained: list[int], times: float, max_repeats: float, seed: int
):
    num_trained, total = np.array(trained), sum(trained)
    target = min(times, max_repeats) * total
    rows = draw_tokens(num_trained, target, max_repeats=max_repeats, rng=np.random.default_rng(seed))
    drawn = int(num_trained[rows].sum())
    assert drawn <= max_repeats * total
    assert abs(drawn - target) <= num_trained.max()
    if target + num_trained.max() <= max_repeats * total:
        assert abs(drawn - target) <= num_trained.max() / 2, "the nearest number of rows"
    repeats = np.bincount(rows, minlength=len(trained))
    assert repeats.max() - repeats.min() <= 1


@given(sizes, st.floats(0, 4), st.floats(0, 4), st.integers(0, 3))
def test_draw_more_only_adds_rows_and_is_the_same_again(trained: list[int], a: float, b: float, seed: int):
    def draw(times: float) -> list[int]:
        rng = np.random.default_rng(seed)
        return draw_tokens(np.array(trained), times * sum(trained), max_repeats=4.0, rng=rng).tolist()

    fewer, more = draw(min(a, b)), draw(max(a, b))
    assert more[: len(fewer)] == fewer
    assert draw(max(a, b)) == more


amounts = st.lists(st.tuples(st.integers(0, 10_000), st.just(0.0) | st.floats(1e-6, 10)), min_size=1, max_size=8)


@given(amounts, st.floats(0, 100_000), st.sampled_from([0.5, 1.0, 4.0]))
def test_fill_any_budget_is_spent_by_shares_up_to_the_caps(
    sources: list[tuple[int, float]], budget: float, max_repeats: float
):
    available, shares = np.array(sources).T
    filled = fill(available, shares, budget, max_repeats)
    caps = available * max_repeats * (shares > 0)
    assert (filled <= caps * (1 + 1e-9)).all() and (filled >= 0).all()
    assert filled.sum() == pytest.approx(min(budget, caps.sum()), abs=1e-6)
    is_open = (filled < caps * (1 - 1e-9)) & (shares > 0)
    if is_open.any():  # those below their cap have one level of tokens a share, and none at its cap is above it
        level = filled[is_open] / shares[is_open]
        assert level == pytest.approx(level[0])
        at_cap = ~is_open & (caps > 0)
        assert (filled[at_cap] <= level[0] * shares[at_cap] * (1 + 1e-9) + 1e-6).all()


@pytest.mark.slow
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
