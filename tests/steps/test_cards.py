"""Cards: the training card follows the log while training runs, and what comes from data is shown as text."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core.data.rendering import RENDERED
from sft_core.pins import pin
from sft_core.recipe import parse_recipe
from sft_core.store import Store
from steps import train
from steps.cards import sample_row
from steps.pack import PACKED


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
    monkeypatch.setattr(train, "REFRESH_S", 0.02)
    pinned = pin(parse_recipe(built_recipe))
    store, part, card = Store(pinned.recipe.runtime.store), {"round": 0}, Card()
    store.ensure(PACKED, pinned)
    located = store.locate(train.TRAINED, pinned, part)
    assert located.ref is not None
    log = store.scratch(located.ref) / "logs" / "log.jsonl"
    log.parent.mkdir(parents=True)
    with train.live_card(store, pinned, part, card):
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


def test_sample_row_shows_markup_of_the_data_as_text(tmp_path: Path) -> None:
    text = "a <b>x</b>\n\n<script>1</script>answer"
    start = text.index("answer")
    spans = [start, len(text)]
    row = dict.fromkeys(RENDERED.names) | {"text": text, "spans": spans}
    (tmp_path / "shard-00000").mkdir()
    pq.write_table(pa.Table.from_pylist([row], schema=RENDERED), tmp_path / "shard-00000" / "rendered.parquet")
    shown = sample_row(tmp_path)[1].render()["source"].strip()
    assert "&lt;script&gt;" in shown and "<script>" not in shown and "\n" not in shown
    assert shown.endswith(">answer</b></div>")
