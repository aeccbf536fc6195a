"""`sft show`: what is green is what is trained, what is reversed is a control token."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.text import Text

from sft_core.store.ref import Ref
from sft_core.store.store import Store

GREEN = 2  # of the terminal's 16 colours
COLOURS = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}


def shown(output: str) -> tuple[str, Text]:
    """(plain text, the row's text with styles) of what was printed; the legend is the last line."""
    text = Text.from_ansi(output.rsplit("\n\n", 1)[0])
    return text.plain, text


def styled(text: Text, test) -> str:
    """The characters whose style passes; without line ends, which a terminal gives no style."""
    flags = [False] * len(text)
    for span in text.spans:
        if test(span.style):
            flags[span.start : span.end] = [True] * (span.end - span.start)
    return "".join(char for char, flag in zip(text.plain, flags, strict=True) if flag and char != "\n")


@pytest.mark.parametrize(("source", "row"), [("copy_no_think", 0), ("checksum_think", 3)])
def test_show_styles_are_those_of_the_rendered_row(built_recipe, sft, save_recipe, source: str, row: int):
    output = sft("show", save_recipe(built_recipe), "--source", source, "--row", row, **COLOURS).stdout
    plain, text = shown(output)
    store = Store(built_recipe["runtime"]["store"])
    tokens = next(
        store.manifest(ref)
        for ref in store.refs()
        if ref.stage == "tokens" and store.manifest(ref)["identity"]["part"] == {"source": source}
    )
    shard = store.path(Ref(*tokens["inputs"]["rendered"])) / "shard-00000"
    rendered = pq.read_table(shard / "rendered.parquet", partitioning=None).to_pylist()[row]
    assert plain == rendered["text"]
    spans = rendered["spans"]
    trained = "".join(rendered["text"][a:b] for a, b in zip(spans[::2], spans[1::2], strict=True))
    assert len(trained) > 3
    assert styled(text, lambda style: style.color is not None and style.color.number == GREEN) == trained.replace(
        "\n", ""
    )
    masked = styled(text, lambda style: bool(style.dim))
    assert len(masked) == len(plain.replace("\n", "")) - len(trained.replace("\n", ""))
    added = json.loads((Path(built_recipe["model"]["tokenizer_name_or_path"]) / "tokenizer.json").read_text())
    control = re.findall("|".join(re.escape(token["content"]) for token in added["added_tokens"]), plain)
    assert control.count("<|im_start|>") >= 2
    assert styled(text, lambda style: bool(style.reverse)) == "".join(control)


def test_show_legend_counts_tokens(built_recipe, sft, save_recipe):
    output = sft("show", save_recipe(built_recipe), "--source", "copy_no_think").stdout
    assert "\x1b" not in output
    legend = output.strip().splitlines()[-1]
    assert legend.startswith("copy_no_think row 0: ") and legend.endswith("trained masked control token")


def test_show_without_a_store_builds_the_source_alone(small_recipe, sft, save_recipe):
    assert "<|im_start|>assistant" in sft("show", save_recipe(small_recipe), "--source", "copy_no_think").stdout
    built = [json.loads(line) for line in (Path(small_recipe["runtime"]["store"]) / "builds.jsonl").open()]
    assert [line["stage"] for line in built] == ["conversations", "rendered", "tokens"]
    assert {line["part"]["source"] for line in built} == {"copy_no_think"}


def test_show_unknown_source_or_row_is_told(built_recipe, sft, save_recipe):
    path = save_recipe(built_recipe)
    message = sft("show", path, "--source", "copy", code=1).output
    assert "--source: found 'copy'; the recipe's sources are copy_no_think, checksum_think" in message
    for row in (60, -1):
        message = sft("show", path, "--source", "copy_no_think", "--row", row, code=1).output
        assert f"--row: found {row}; copy_no_think has rows 0 to 59" in message
