"""Cards: the training card follows the log while training runs, and what comes from data is shown as text."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_core.data.mixing.mixture_counts import AMOUNTS
from sft_core.data.tokens.sample import MAX_PIECES, pieces
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.ref import Ref
from sft_core.store.stage import Stage
from sft_core.store.store import Store
from steps.cards import mixture, packs, tokens, training
from steps.cards.pieces import bins, heading, table
from steps.mix import MIXTURE
from steps.pack import PACKED
from steps.tokenize import TOKENS
from steps.train import TRAINED
from tests.browser import Browser, Page


class Card:
    """Stands where Metaflow's current.card does, and keeps what it was given."""

    def __init__(self) -> None:
        self.components: list[Any] = []
        self.num_refreshes = 0

    def clear(self) -> None:
        self.components = []

    def extend(self, components: list[Any]) -> None:
        self.components += components

    def refresh(self, data: Any) -> None:
        assert self.components
        self.num_refreshes += 1


def test_live_card_draws_the_losses_logged_so_far(built_recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "REFRESH_S", 0.02)
    pinned = pin(parse_recipe(built_recipe))
    store, part, card = Store(pinned.recipe.runtime.store), {"round": 0}, Card()
    store.ensure(PACKED, pinned)
    located = store.locate(TRAINED, pinned, part)
    assert located.ref is not None
    log = store.scratch(located.ref) / "logs" / "log.jsonl"
    log.parent.mkdir(parents=True)
    with training.live_card(store, pinned, part, card):
        for step in (1, 2):
            with log.open("a") as file:
                file.write(json.dumps({"step": step, "of": 9, "loss": 5.0 / step, "loss/copy": 4.0}) + "\n{")
            deadline = time.monotonic() + 20
            while card.num_refreshes < step:
                assert time.monotonic() < deadline, f"step {step} is not drawn"
                time.sleep(0.01)
            shown = json.dumps([component.render() for component in card.components])
            assert f"{step} of 9" in shown and "loss per trained token" in shown
            log.write_text(log.read_text().removesuffix("{"))
    shutil.rmtree(store.scratch(located.ref))


HOSTILE = "<script>alert(1)</script> | `code` **b** </div></script><img src=x onerror=alert(2)>"


@pytest.fixture
def hostile_recipe(small_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A source whose rows are markup, some of them twice and some of no use, beside one of the quickstart."""

    def row(number: int) -> dict[str, Any]:
        said = f"{HOSTILE}\n\n# no heading {number}"
        return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": f"{number} {said}"}]}

    rows = [*map(row, range(40)), row(0), row(1), {"messages": []}, {"other": HOSTILE}, {"messages": HOSTILE}]
    (tmp_path / "hostile.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    mixture = small_recipe["dataset_mixture"]
    datasets = [{"path": str(tmp_path / "hostile.jsonl")}, mixture["datasets"][1]]
    changed = {"datasets": datasets, "deduplication": {"near": False}, "max_rejected_share": 0.2}
    return small_recipe | {"dataset_mixture": mixture | changed}


@pytest.fixture
def made(hostile_recipe: dict[str, Any]) -> Callable[..., tuple[Store, Ref, dict[str, Any]]]:
    """Builds a stage of the hostile recipe: its store, its address and its counts."""
    pinned = pin(parse_recipe(hostile_recipe))
    store = Store(pinned.recipe.runtime.store)

    def make(stage: Stage, **part: str) -> tuple[Store, Ref, dict[str, Any]]:
        ref = store.ensure(stage, pinned, **part)
        return store, ref, store.manifest(ref)["counts"]

    return make


def plain(cell: str) -> int:
    return int(cell.replace(",", ""))


def is_text(page: Page) -> bool:
    """Whether the hostile row is on the page as it was written, and did nothing."""
    return HOSTILE in page.text and not any("no heading" in heading for heading in page.headings) and not page.errors


@pytest.mark.slow
def test_tokenize_card_shows_counts_lengths_and_a_row_as_text(made, browser: Browser) -> None:
    store, ref, counts = made(TOKENS, source="hostile")
    page = browser.card(tokens.card(store, ref))
    assert is_text(page) and f"0 {HOSTILE}\n\n# no heading 0<|im_end|>" in page.text
    told, rejected = page.tables
    shown = dict(told)
    assert (shown["rows read"], shown["conversations kept"], plain(shown["training rows"])) == (
        "45",
        "42",
        counts["rows"],
    )
    assert plain(shown["tokens"]) == counts["tokens"]
    assert shown["trained tokens"].startswith(f"{counts['trained_tokens']:,} (")
    reasons = counts["source"]["rejected"]["download"]
    assert sum(reasons.values()) == 3 and len(reasons) > 1
    assert {tuple(row) for row in rejected[1:]} == {("hostile", "download", why, str(n)) for why, n in reasons.items()}
    for chart, name in zip(page.charts, ("rows_by_tokens", "rows_by_trained_tokens"), strict=True):
        wanted = [counts[name][lower] for lower in sorted(counts[name], key=int)]
        assert [one["count"] for one in chart.values if one["count"]] == wanted
        assert len(chart.marks["rect"]) == len(chart.values) and "rows" in chart.axes


def test_tokenize_card_needs_none_of_the_outputs_before(made) -> None:
    store, ref, counts = made(TOKENS, source="hostile")
    inputs = store.manifest(ref)["inputs"]
    assert set(inputs) == {"conversations", "rendered"}
    for stage, key in inputs.values():
        shutil.rmtree(store.root / stage / key)
    (*_, row) = tokens.card(store, ref)
    (text,) = [text for text, is_trained in counts["sample"] if is_trained]
    assert text.startswith(f"0 {HOSTILE}") and "<b style='color:#1f6feb'>0 &#60;script&#62;" in row.render()["source"]


@pytest.mark.slow
def test_mix_card_shows_shares_lengths_and_what_became_of_each_row(made, browser: Browser) -> None:
    store, ref, counts = made(MIXTURE)
    page = browser.card(mixture.card(store, ref))
    assert is_text(page), "the text of a duplicate"
    assert plain(dict(page.tables[0])["trained tokens"]) == counts["trained_tokens"]
    tables = {tuple(table[0]): table[1:] for table in page.tables}
    for row, (name, one) in zip(
        tables["source", "asked", "repeats", "rows", "tokens", "trained tokens"], counts["sources"].items(), strict=True
    ):
        assert row[0] == name
        wanted = [f"{one['requested'][amount]:.1%} → {one['achieved'][amount]:.1%}" for amount in AMOUNTS]
        assert [cell.replace("\n", " ") for cell in row[3:]] == wanted
    journey = next(table for table in page.tables if table[0][:2] == ["source", "read"])
    hostile = dict(zip(journey[0], journey[1], strict=True))
    one = counts["sources"]["hostile"]
    assert (hostile["read"], hostile["rejected"], hostile["rows"], hostile["duplicates"]) == (
        "45",
        "3",
        "42",
        str(one["duplicates"]),
    )
    assert one["duplicates"] > 0 and plain(hostile["kept"]) == one["kept"]
    shares, lengths = page.charts
    drawn = {(v["name"], v["amount"], v["kind"]): v["share"] for v in shares.values}
    assert drawn["hostile", "trained tokens", "achieved"] == one["achieved"]["trained_tokens"]
    assert len(drawn) == 2 * 3 * 2 and shares.legend == ["requested", "achieved"]
    of = [v for v in lengths.values if v["source"] == "hostile" and v["kind"] == "tokens"]
    assert {str(v["from"]): round(v["share"] * one["kept"]) for v in of} == one["rows_by_tokens"]
    assert {"hostile", "checksum_think"} <= set(lengths.labels)


@pytest.mark.slow
def test_pack_card_shows_the_fill_and_what_a_pack_holds(made, browser: Browser) -> None:
    store, ref, counts = made(PACKED)
    page = browser.card(packs.card(store, ref))
    assert page.errors == []
    shown = dict(page.tables[0])
    assert (plain(shown["packs"]), shown["fill"]) == (counts["packs"], f"{counts['fill']:.2%}")
    (pairs,) = [value.replace("\n", " ") for name, value in shown.items() if name.startswith("attention")]
    assert pairs == ", ".join(f"{counts['attention_of_packs'][name]:,}" for name in ("least", "mean", "most"))
    fills, documents, lengths = page.charts
    assert {str(one["percent"]): one["count"] for one in fills.values} == counts["packs_by_fill"]
    for chart, total in ((documents, "packs"), (lengths, "documents")):
        assert sum(one["count"] for one in chart.values) == counts[total]
        assert len(chart.marks["rect"]) == len(chart.values)


def test_bins_between_are_shown_empty_and_nothing_is_drawn_of_nothing() -> None:
    assert bins({"0": 3, "16": 1, "7": 2}) == [
        (7, 8, 2),
        (8, 10, 0),
        (10, 12, 0),
        (12, 14, 0),
        (14, 16, 0),
        (16, 20, 1),
    ]
    assert bins({"0": 3}) == bins({}) == []


def write_log(folder: Path, events: list[dict[str, Any]]) -> None:
    (folder / "logs").mkdir()
    (folder / "logs" / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.slow
def test_training_card_of_25_sources_stays_legible_and_survives_a_loss_that_is_no_number(
    tmp_path: Path, browser: Browser
) -> None:
    names = [f"a_source_whose_name_is_much_too_long_for_a_chart_{number:02}_no_think" for number in range(25)]
    events = [
        {"step": step, "of": 40, "loss": math.nan if step == 7 else 5 / step, "seconds": 30.0, "grad_norm": math.inf}
        | {f"loss/{name}": 6 / step for name in names}
        for step in range(1, 21)
    ]
    write_log(tmp_path, events)
    (tmp_path / "logs" / "balance.jsonl").write_text('{"ranks": 4, "packs_a_step": 8, "slowest_over_mean": 1.25}\n')
    page = browser.card(training.card(tmp_path))
    assert page.errors == []
    shown = dict(page.tables[0])
    assert (shown["time so far"], shown["time to go"]) == ("10 minutes", "10 minutes")
    assert shown["slowest rank / mean rank, FLOPs"] == "1.2500 (4 ranks, 8 packs a step)"
    together, by_source, measures = page.charts
    assert together.values[6]["loss"] is None and len(together.values) == 20
    assert len(by_source.marks["line"]) == 50 and by_source.legend == ["all sources", "this source"]
    assert by_source.width < 900, "as wide as a card shows"
    assert {value["measure"] for value in measures.values} == {"gradient norm"}, "no chart of what is not logged"
    assert len(page.tables[1]) == 26 and page.tables[2][-1][1] == "0.2500"


def test_training_card_of_a_long_run_is_not_large(tmp_path: Path) -> None:
    event = {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, **{f"loss/source_{n}": 1.0 for n in range(25)}}
    write_log(tmp_path, [{"step": step, "of": 5000, **event} for step in range(1, 5001)])
    rendered = [component.render() for component in training.card(tmp_path)]
    assert len(json.dumps(rendered)) < 1_500_000
    steps = [one["step"] for one in rendered[4]["spec"]["data"]["values"]]
    assert len(steps) == 1000 and steps[0] == 1 and steps[-1] == 5000


def test_training_card_of_one_event_tells_no_source_apart(tmp_path: Path, browser: Browser) -> None:
    write_log(tmp_path, [{"step": 1, "of": 1, "loss": 2.0, "loss/only": 2.0}])
    page = browser.card(training.card(tmp_path))
    (together,) = page.charts
    assert page.errors == [] and len(together.marks["symbol"]) == 1, "a line through one point is not seen"


@pytest.mark.parametrize(
    ("text", "spans", "wanted"),
    [
        ("abcd", [1, 2, 3, 4], [("a", False), ("b", True), ("c", False), ("d", True)]),
        ("ab", [0, 2], [("ab", True)]),
        ("a" * 400 + "b" * 100 + "c" * 400, [], [("a" * 400 + "[... 100 characters ...]" + "c" * 400, False)]),
    ],
)
def test_sample_has_a_rows_pieces_in_order(text: str, spans: list[int], wanted: list[tuple[str, bool]]) -> None:
    assert pieces(text, spans) == wanted


def test_sample_of_many_turns_leaves_out_those_in_the_middle() -> None:
    found = pieces("ab" * 50, [*range(100)])
    assert len(found) == MAX_PIECES + 1
    assert found[MAX_PIECES // 2] == (f"\n[... {100 - MAX_PIECES} pieces ...]\n", False)


@pytest.mark.slow
def test_tables_of_long_names_are_not_cut_off(browser: Browser) -> None:
    """A card cuts off what is wider than its place; the browser says so in `errors`."""
    rows = [(f"smoltalk_smollm3_everyday_conversations_{n:02}_no_think", *[f"{n}.12345"] * 8) for n in range(25)]
    alone = browser.card([table(("source", *"abcdefgh"), rows)])
    assert alone.errors and "pixels wide" in alone.errors[0]
    page = browser.card([heading("Scores"), table(("source", *"abcdefgh"), rows)])
    assert page.errors == []
    assert page.headings == ["Scores"] and page.tables[0][1][0].replace("\n", "") == rows[0][0]
