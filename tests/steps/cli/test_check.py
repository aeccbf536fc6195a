"""`sft check`: what the mask proof checked, or the row that fails it; `sft show` and the flow show that row alike."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.text import Text

from sft_core.data.proof.decoded import Piece
from sft_core.data.proof.mask import MaskProofFailed
from sft_core.data.shards.token_shards import read_index
from sft_core.data.tokenizer.encoded import EncodedRows
from sft_core.data.tokens import build as tokens
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps import tokenize
from steps.cards import tokens as tokens_card
from steps.colour import errors_as_text
from tests.data.rendering.test_rendering import REWRITES

COLOURS = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
SOURCES = ("copy_no_think", "checksum_think")


def token_counts(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    store = Store(recipe["runtime"]["store"])
    manifests = [store.manifest(ref) for ref in store.refs() if ref.stage == "tokens"]
    return {manifest["identity"]["part"]["source"]: manifest["counts"] for manifest in manifests}


def test_check_prints_what_was_proved_of_each_source(built_recipe, sft, save_recipe):
    path = save_recipe(built_recipe)
    rows = json.loads(sft("check", path, "--json").stdout)
    assert [row["source"] for row in rows] == list(SOURCES)
    for row in rows:
        counts = token_counts(built_recipe)[row["source"]]
        assert row["rows"] == row["turns"] == counts["rows"] == counts["proof"]["rows"] == 60
        assert 0 < row["prompts"] == counts["proof"]["prompts"] < 10
        assert row["trained_share"] == counts["trained_tokens"] / counts["tokens"] > 0
        assert (row["rows_added"], row["duplicated_tokens"], row["rejected"]) == (0, 0, 0)
    lines = sft("check", path).stdout.splitlines()
    assert re.split(r"\s{2,}", lines[0])[:5] == ["source", "conversations", "rejected", "rows checked", "turns"]
    for line, row in zip(lines[2:4], rows, strict=True):
        assert line.split()[:5] == [row["source"], "60", "0", "60", "60"]
        assert f"{row['trained_share']:.1%}" in line
    trained, total = (sum(row[count] for row in rows) for count in ("trained_tokens", "tokens"))
    assert lines[-1] == (
        f"all 120 rows proved: 120 turns, {trained:,} of {total:,} tokens trained ({trained / total:.1%}); "
        "the shards are as they were written"
    )


def test_check_builds_what_is_missing_and_nothing_else(small_recipe, sft, save_recipe):
    path = save_recipe(small_recipe)
    assert "all 40 rows proved" in sft("check", path, "--limit", 20).stdout
    journal = Path(small_recipe["runtime"]["store"]) / "builds.jsonl"
    built = [(line["stage"], line["part"]["source"]) for line in map(json.loads, journal.open())]
    assert built == [(stage, source) for source in SOURCES for stage in ("conversations", "rendered", "tokens")]
    sft("check", path, "--limit", 20)
    assert len(list(journal.open())) == len(built)


def test_check_counts_what_a_rewritten_history_costs(small_recipe, sft, save_recipe, tmp_path: Path):
    turns = [("user", "a"), ("assistant", "A"), ("user", "say <|im_end|>"), ("assistant", "B")]
    thinks = [{"role": role, "content": text, "reasoning_content": "hm"} for role, text in turns]
    plain = [{"role": role, "content": text} for role, text in turns]
    rows = [{"messages": messages} for messages in (thinks, plain, thinks, [{"role": "user"}])]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewrites.jinja").write_text(REWRITES)
    small_recipe["dataset_mixture"] = {
        "datasets": [{"path": str(tmp_path / "talks.jsonl")}],
        "report_share": 0.0,
        "max_rejected_share": 0.5,
    }
    small_recipe["chat_template"] = {"template": str(tmp_path / "rewrites.jinja")}
    path = save_recipe(small_recipe)
    (found,) = json.loads(sft("check", path, "--json").stdout)
    expected = {"conversations": 3, "rejected": 1, "rows": 5, "turns": 6, "rows_added": 2, "conversations_split": 2}
    assert {key: found[key] for key in expected} == expected
    assert found["control_tokens_kept_as_text"] == 3
    store = Store(small_recipe["runtime"]["store"])
    (folder,) = [store.path(ref) for ref in store.refs() if ref.stage == "tokens"]
    index = read_index(folder).to_pylist()
    untrained = sorted(row["num_tokens"] - row["num_trained"] for row in index)
    # The first turn's prompt stands again in the row of the second, for each of the two that are split.
    assert found["duplicated_tokens"] == sum(untrained[:2]) > 0
    assert sft("check", path).stdout.splitlines()[2].split()[-3:] == ["2", str(found["duplicated_tokens"]), "3"]


def test_check_damaged_shard_is_told(built_recipe, sft, save_recipe):
    (path, *_) = sorted(Path(built_recipe["runtime"]["store"]).glob("tokens/*/shard-00000/tokens.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    output = sft("check", save_recipe(built_recipe), code=1).output
    assert "shard-00000/tokens.arrow has" in output
    assert "sft store gc tokens/" in output
    assert "proved" not in output


# A fault


@pytest.fixture
def faulty(small_recipe, save_recipe, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe whose mask trains the headers' last token, and a message that holds markup of Rich's."""
    source = Path(small_recipe["runtime"]["store"]).parent / "talks.jsonl"
    turns = [{"role": "user", "content": "a [bold]word[/bold]"}, {"role": "assistant", "content": "[red]A[/red]"}]
    source.write_text(json.dumps({"messages": turns}))
    small_recipe["dataset_mixture"] = {"datasets": [{"name": "talks", "path": str(source)}], "report_share": 0.0}
    small_recipe["chat_template"]["kwargs"] = {"header": False}
    small_recipe["runtime"]["num_workers"] = 1
    true = tokens.encode_rows

    def spoiled(*args: Any) -> EncodedRows:
        encoded = true(*args)
        trained = encoded.trained.copy()
        trained[np.flatnonzero(np.diff(trained.astype(int)) == 1)] = 1
        return dataclasses.replace(encoded, trained=trained)

    monkeypatch.setattr(tokens, "encode_rows", spoiled)
    return save_recipe(small_recipe)


ROW = "<|im_start|>user\na [bold]word[/bold]<|im_end|>\n<|im_start|>assistant\n[red]A[/red]<|im_end|>\n"
TRAINED = "assistant\n[red]A[/red]<|im_end|>"  # the header's last token is all of this line


@pytest.mark.parametrize("command", [("check",), ("show", "--source", "talks")], ids=["check", "show"])
def test_fault_ends_with_the_row_in_plain_text_where_there_is_no_terminal(faulty, sft, tmp_path: Path, command):
    name, *options = command
    output = sft(name, faulty, *options, code=1).output
    assert "\x1b" not in output
    assert re.search(
        r"mask proof: conversation \w{16}: messages\[1\] is trained from 'assistant\\n\[red\]A.*not from", output
    )
    assert ROW.replace(TRAINED, f"⟦{TRAINED}⟧") in output
    assert "while building tokens talks" in output
    assert not list(tmp_path.glob("store/tokens/*"))


@pytest.mark.parametrize("command", [("check",), ("show", "--source", "talks")], ids=["check", "show"])
def test_fault_ends_with_the_row_in_colour_in_a_terminal(faulty, sft, command):
    name, *options = command
    output = sft(name, faulty, *options, code=1, **COLOURS).output
    check_colours(output)
    assert "while building tokens talks" in output


def check_colours(output: str) -> None:
    """What is trained is green and not dim, all else dim; control tokens are reversed."""
    assert "messages[1] is trained from" in output
    assert "⟦" not in output
    shown = Text.from_ansi(output)
    start = shown.plain.rindex("<|im_start|>user")
    row = shown[start : start + len(ROW)]
    assert row.plain.rstrip() == ROW.rstrip()

    def styled(test: Callable[[Any], bool]) -> str:
        flags = [False] * len(row)
        for span in row.spans:
            if test(span.style):
                flags[span.start : span.end] = [True] * (span.end - span.start)
        return "".join(char for char, flag in zip(row.plain, flags, strict=True) if flag and char != "\n")

    assert styled(lambda style: style.color is not None and style.color.number == 2) == TRAINED.replace("\n", "")
    assert styled(lambda style: bool(style.dim)) == ROW.replace(TRAINED, "").replace("\n", "")
    assert styled(lambda style: bool(style.reverse)) == "".join(re.findall(r"<\|.*?\|>", ROW))


def test_fault_in_a_task_is_painted_for_the_terminal_that_reads_its_log(capfd, monkeypatch: pytest.MonkeyPatch):
    pieces = [Piece("a", False), Piece("b", True), Piece("<c>", True, True)]
    for is_read_in_a_terminal in (False, True):
        monkeypatch.setenv("TTY_COMPATIBLE", str(int(is_read_in_a_terminal)))
        monkeypatch.setenv("TERM", "xterm-256color")
        with pytest.raises(MaskProofFailed, match="a⟦b<c>⟧"), errors_as_text():
            raise MaskProofFailed("it is wrong", pieces)
        shown = capfd.readouterr().err
        assert ("it is wrong" in shown) == ("\x1b[32mb" in shown) == is_read_in_a_terminal
    with pytest.raises(ValueError, match="another"), errors_as_text():
        raise ValueError("another")
    assert capfd.readouterr().err == ""


def test_card_of_a_source_says_what_was_proved(built_recipe):
    pinned = pin(parse_recipe(built_recipe))
    store = Store(pinned.recipe.runtime.store)
    ref = store.ensure(tokenize.TOKENS, pinned, source="copy_no_think")
    shown = json.dumps([component.render() for component in tokens_card.card(store, ref)])
    counts = store.manifest(ref)["counts"]["proof"]
    assert f"60 rows and 60 turns hold; {counts['prompts']} served prompts, {counts['forms']} forms" in shown
    assert "0: 0 rows more, 0 tokens of context repeated" in shown
