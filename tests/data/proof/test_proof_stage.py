"""The mask proof in the stage that tokenizes: a fault ends the build, leaves nothing, and shows the row."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_core.data.proof.mask import MaskProofFailed
from sft_core.data.rendering import spans
from sft_core.data.rendering.spans import RenderedRow, Renderer
from sft_core.data.tokenizer.encoded import EncodedRows
from sft_core.data.tokens import build as tokens
from sft_core.store.store import Store
from steps.render import RENDERED
from steps.tokenize import TOKENS
from tests.data.families import assistant, talk, user
from tests.data.proof.spoiled import (
    START,
    STOP,
    TURNS,
    chat,
    fails,
    group,
    moved,
    without,
)
from tests.data.rendering.test_rendering import CHATML as PLAIN

# The stage

RAW = [
    {
        "messages": [
            {"role": "user", "content": f"Hello {number}"},
            {"role": "assistant", "content": f"Hi {number}.", "weight": 0.5},
            {"role": "user", "content": f"What is {STOP}?"},
            {"role": "assistant", "content": f"A token {number}.", "reasoning_content": "Hm."},
        ]
    }
    for number in range(5)
]


def change_result(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Plants a fault: what a function of the code under test gives is changed."""
    true = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(true(*args, **kwargs)))


def borders(start: int = 0, end: int = 0) -> Callable[[list[RenderedRow]], list[RenderedRow]]:
    return lambda rows: [moved(row, 0, start, end) for row in rows]


def each(**fields: Any) -> Callable[[list[RenderedRow]], list[RenderedRow]]:
    return lambda rows: [dataclasses.replace(row, **fields) for row in rows]


def shift_mask(encoded: EncodedRows) -> EncodedRows:
    return dataclasses.replace(encoded, trained=np.roll(encoded.trained, 1))


PLANTED: dict[str, tuple[Any, str, Callable[[Any], Any], str]] = {
    "an earlier start": (Renderer, "render", borders(start=-1), r"messages\[1\] is trained from"),
    "an earlier start of all": (spans, "trained_from", lambda start: start - 1, r"messages\[1\] is trained from"),
    "a later start": (Renderer, "render", borders(start=1), "says what no message says"),
    "a stop left out": (Renderer, "render", borders(end=-len(STOP)), "does not end with a stop token"),
    "a newline trained": (Renderer, "render", borders(end=1), "does not end with a stop token"),
    "a turn left out": (
        Renderer,
        "render",
        lambda rows: [dataclasses.replace(without(row, 0), weights=[]) for row in rows],
        r"messages \[1\] are to be trained and no row trains them",
    ),
    "a row twice": (Renderer, "render", lambda rows: [*rows, rows[-1]], "is trained again"),
    "typed tokens that are real": (Renderer, "render", each(literals=[]), r"it has the control token in '<\|im_end"),
    "weights lost": (Renderer, "render", each(weights=[]), r"the turns' weights are \[0\.5, 1\.0\]; the row has \[\]"),
    "a mask that is shifted": (tokens, "encode_rows", shift_mask, "says what no message says"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_stage_with_a_fault_planted_ends_and_leaves_nothing(
    name: str, write_rows, pinned, ensure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    owner, function, change, fault = PLANTED[name]
    source = {"name": "s", "path": str(write_rows("a.jsonl", RAW))}
    recipe = pinned(source, runtime={"num_workers": 1})
    change_result(monkeypatch, owner, function, change)
    assert ensure(RENDERED, recipe, source="s")[1]["counts"]["rows"] >= 5
    with pytest.raises(MaskProofFailed, match=fault) as failed:
        ensure(TOKENS, recipe, source="s")
    assert any("while building tokens s" in note for note in failed.value.__notes__)
    assert re.match("mask proof: conversation [0-9a-f]{16}: ", failed.value.fault)
    assert f"<|im_start|>user\nHello 0{STOP}" in str(failed.value).replace("⟦", "").replace("⟧", "")
    assert {ref.stage for ref in Store(tmp_path / "store").refs()} == {"conversations", "rendered"}
    assert not [*tmp_path.glob("store/.partial/*/shard-*")]
    monkeypatch.undo()


@pytest.mark.slow
def test_stage_with_a_fault_in_a_later_shard_ends_out_of_its_worker(
    write_rows, pinned, ensure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [
        {"messages": [{**turn, "content": f"{turn['content']} {n}"} for turn in RAW[0]["messages"]]}
        for n in range(1100)
    ]
    recipe = pinned({"name": "s", "path": str(write_rows("a.jsonl", rows))}, runtime={"num_workers": 2})
    ensure(RENDERED, recipe, source="s")

    def spoil_row_1050(encoded: EncodedRows) -> EncodedRows:
        trained = encoded.trained.copy()
        if len(encoded) == 100:  # the third and last group
            trained[encoded.offsets[50] : encoded.offsets[51]] = 1
        return dataclasses.replace(encoded, trained=trained)

    change_result(monkeypatch, tokens, "encode_rows", spoil_row_1050)
    with pytest.raises(MaskProofFailed, match=r"messages\[0\], of the user, is trained and must not be") as failed:
        ensure(TOKENS, recipe, source="s")
    assert any(piece.is_trained and "1050" in piece.text for piece in failed.value.pieces)
    assert {ref.stage for ref in Store(tmp_path / "store").refs()} == {"conversations", "rendered"}
    monkeypatch.undo()
    counts = ensure(TOKENS, recipe, source="s")[1]["counts"]
    assert counts["proof"]["rows"] == counts["rows"] == 1100
    assert counts["proof"]["turns"] == 2200


# The example


def test_example_of_a_long_row_is_what_stands_around_the_fault():
    long = "So it is and so it was. " * 3000
    made = group(
        chat(PLAIN), talk(user(long), assistant(long), user("Why?"), assistant("So."), user(long), assistant("A"))
    )
    made.rows[0] = moved(made.rows[0], 1, 1)
    with pytest.raises(MaskProofFailed, match=r"says what no message says: 'o\.'") as failed:
        made.prove()
    assert len(str(failed.value)) < 5000
    text = "".join(piece.text for piece in failed.value.pieces)
    assert re.fullmatch(r" \[… [\d,]{6,} tokens …\] .*Why\?.* \[… [\d,]{6,} tokens …\] ", text, re.DOTALL)
    assert f"S⟦o.{STOP}⟧" in str(failed.value)
    assert [piece.text for piece in failed.value.pieces if piece.is_control].count(START) == 3


def test_example_survives_the_way_out_of_a_worker():
    made = group(chat(), TURNS)
    made.rows[0] = moved(made.rows[0], 0, -1)
    error = fails(made, "is trained from")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.pieces, again.fault) == (str(error), error.pieces, error.fault)
