"""The mix card: shares asked for and achieved, and every row that is left out with what it repeats or holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.report.plots import BASE_COLOUR, TUNED_COLOUR, requested_and_achieved
from sft_core.store.store import Store
from steps import mix
from steps.cards import mixture


def card(data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What the card shows, as text; and the mixture's counts."""
    pinned = pin(parse_recipe(data))
    store = Store(pinned.recipe.runtime.store)
    ref = store.ensure(mix.MIXTURE, pinned)
    shown = json.dumps([component.render() for component in mixture.card(store, ref)], ensure_ascii=False)
    return shown, store.manifest(ref)["counts"]


def test_card_shows_shares_asked_for_and_achieved(built_recipe):
    for dataset, share in zip(built_recipe["dataset_mixture"]["datasets"], (19, 1), strict=True):
        dataset["trained_token_share"] = share
    shown, counts = card(built_recipe)
    assert "95.0% of trained tokens" in shown and "Shares: requested → achieved" in shown
    achieved = counts["sources"]["copy_no_think"]["achieved"]["trained_tokens"]
    assert f"95.0% → {achieved:.1%}" in shown
    assert '"yOffset"' in shown and "share of the mixture" in shown
    assert "held at max_repeats 4" in shown, "a share that four copies of it cannot give"
    assert '"duplicates"' not in shown and "Duplicates" not in shown and "Contaminated" not in shown


def test_chart_has_a_bar_for_what_was_asked_and_one_for_what_came():
    spec = requested_and_achieved([{"name": "a", "amount": "rows", "requested": 0.5, "achieved": 0.4}])
    assert spec["data"]["values"] == [
        {"name": "a", "amount": "rows", "kind": "requested", "share": 0.5},
        {"name": "a", "amount": "rows", "kind": "achieved", "share": 0.4},
    ]
    assert spec["encoding"]["color"]["scale"]["range"] == [BASE_COLOUR, TUNED_COLOUR]


@pytest.fixture
def overlapping(small_recipe, tmp_path: Path) -> dict[str, Any]:
    """Two sources: the second repeats rows of the first, and asks inside longer texts what is in the report split."""

    def row(user: str, assistant: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}

    facts = [f"Tell me about number {n} of the long and winding list of {n * 7} things <b>" for n in range(60)]
    rows = {"first": [row(fact, f"It is thing {n}.") for n, fact in enumerate(facts)]}
    rows["second"] = [
        *rows["first"][:30],
        *[row(f"Somebody once asked: {fact} What is a good reply to that?", "This.") for fact in facts],
    ]
    for name, of in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in of))
    small_recipe["dataset_mixture"] |= {
        "datasets": [{"path": str(tmp_path / f"{name}.jsonl")} for name in rows],
        "deduplication": {},
        "decontamination": {},
    }
    small_recipe["evaluation"] = {"tasks": ["first"]}
    return small_recipe | {"limit": None}


def test_card_shows_what_was_left_out_and_why(overlapping):
    shown, counts = card(overlapping)
    first, second = counts["sources"].values()
    assert first["duplicates"] == first["contaminated"] == 0
    assert second["duplicates"] > 15 and second["contaminated"] > 3
    for one in (first, second):
        assert one["train"] == one["without_trained_token"] + one["duplicates"] + one["contaminated"] + one["available"]
    assert f"Duplicates: {second['duplicates']} exact and 0 near, of" in shown
    assert f"Contaminated: {second['contaminated']} conversations of" in shown
    for said in (
        '"duplicates", "contaminated", "left", "kept"',
        "Some duplicates",
        "Some contaminated rows",
        "Somebody once asked",
        "long and winding",
    ):
        assert said in shown


def test_card_says_that_nothing_was_left_out(built_recipe):
    built_recipe["dataset_mixture"] |= {"deduplication": {}, "decontamination": {}}
    shown, counts = card(built_recipe)
    assert sum(one["duplicates"] + one["contaminated"] for one in counts["sources"].values()) == 0
    assert "Duplicates: none" in shown and "Contaminated rows: none" in shown
