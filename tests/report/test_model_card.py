"""The model card: what any name, licence or number turns into is metadata and Markdown that is read back the same."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sft_core.recipe.parse import read_yaml
from sft_core.report.model_card import Base, Card, CutOff, Score, Source, Value, interval, model_card

EVIL = "a|b\n---\n# `x` <script>&amp; [l](http://x) *b* _i_ \\ \u2028 ``` : {#"


def scored(
    task: str,
    metric: str,
    n: int,
    base: float,
    base_stderr: float,
    tuned: float,
    stderr: float,
    difference: Any = None,
    *,
    is_share: bool = False,
) -> Score:
    by_model = {"base": Value(base, base_stderr), "tuned": Value(tuned, stderr)}
    return Score(task, metric, n, by_model, difference, is_share=is_share)


def card(**changes: Any) -> Card:
    source = {"config": "SFT", "split": "train", "files": (), "revision": "c" * 40, "licence": "mit"}
    counts = {"conversations": 70, "rows": 50, "tokens": 900, "trained_tokens": 300, "share": 0.75}
    scores = [
        scored("one", "exact_match", 100, 0.0, 0.0, 0.5, 0.05, (0.5, 0.4, 0.6), is_share=True),
        scored("one", "loss", 100, 2.5, 0.1, 1.25, 0.05, (-1.25, None, None)),
    ]
    values: dict[str, Any] = {
        "name": "mine",
        "base": Base("org/base", "org/base", "b" * 40, "apache-2.0"),
        "sources": [Source("one", "tuned", "org/one", **source, **counts)],
        "scores": scores,
        "cut_offs": [CutOff("one", 50, {"base": 40, "tuned": 1})],
        "gains": (("task", "gain"), [("one", 0.25)]),
        "training": {"tuned": {"optimizer steps": 9}},
        "recipe": {"name": "mine", "training": {"learning_rate": 1e-5}},
        "template_kwargs": {"header": False},
        "has_thinking_switch": True,
        "lineage": [("report", "report/0123")],
    }
    return Card(**{**values, **changes})


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table that begins with the header's first cells; what Markdown escapes is as it was."""
    found = re.search(rf"^\| {re.escape(header)}.*\n\| -.*\n((?:\|.*\n?)+)", text, re.MULTILINE)
    assert found, header
    return [[plain(cell.strip()) for cell in line.split("|")[1:-1]] for line in found[1].strip().splitlines()]


def plain(cell: str) -> str:
    return html.unescape(re.sub(r"</?span>", "", cell))


def test_metadata_is_what_the_hub_reads():
    read = ModelCard(model_card(card()))
    data = read.data.to_dict()
    assert data["base_model"] == "org/base" and data["datasets"] == ["org/one"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "license" not in data, "nobody has chosen one"
    found = [(r.metric_type, r.metric_value, r.metric_args["n"], r.dataset_type) for r in read.data.eval_results]
    assert found == [("exact_match", 0.5, 100, "org/one"), ("loss", 1.25, 100, "org/one")]
    assert {(r.dataset_config, r.dataset_split, r.dataset_revision) for r in read.data.eval_results} == {
        ("SFT", "train", "c" * 40)
    }


def test_metadata_of_local_files_and_folders_names_no_hub_id():
    local = Base("folder", None, "d" * 64, None)
    source = Source("one", "tuned", None, None, None, ("a.jsonl",), "e" * 64, None, 1, 1, 1, 1, 1.0)
    text = model_card(card(base=local, sources=[source]))
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None
    assert data.eval_results[0].dataset_type == "one" and data.eval_results[0].dataset_revision is None
    assert rows(text, "source | from") == [["one", "a.jsonl", "e" * 64, "unknown", "1", "1", "1", "1", "100.0%"]]
    assert "Licence of the base model: unknown." in text


def test_tables_tell_scores_with_intervals_cut_offs_and_gains():
    text = model_card(card())
    assert rows(text, "task | metric") == [
        [
            "one",
            "exact match",
            "100",
            "0.0000 (0.0000 to 0.0370)",
            "0.5000 (0.4038 to 0.5962)",
            "+0.5000 (+0.4000 to +0.6000)",
        ],
        ["one", "loss", "100", "2.5000 (2.3040 to 2.6960)", "1.2500 (1.1520 to 1.3480)", "-1.2500"],
    ]
    assert rows(text, "task | answers") == [["one", "50", "80.0%", "2.0%"]]
    assert rows(text, "task | gain") == [["one", "0.2500"]]
    assert "cut off" not in model_card(card(cut_offs=[])) and "thinking gains" not in model_card(card(gains=((), [])))


def test_interval_of_a_share_has_a_width_where_every_answer_is_right():
    # Wilson (1927): n / (n + z^2) from below where all are right.
    assert interval(1.0, 0.0, 228, is_share=True) == (pytest.approx(228 / (228 + 1.959964**2), abs=1e-6), 1.0)
    assert interval(1.0, 0.0, 228, is_share=False) == (1.0, 1.0)
    assert interval(2.0, None, 1, is_share=False) == (None, None)


def test_score_that_is_no_number_is_in_the_table_and_not_in_the_metadata():
    text = model_card(card(scores=[scored("one", "loss", 3, 1.0, 0.1, float("nan"), float("nan"))]))
    assert ModelCard(text).data.eval_results is None
    assert rows(text, "task | metric")[0][-2:] == ["nan", "-"]


def test_smoke_run_says_so():
    assert "smoke" not in model_card(card())
    assert "**A smoke run**, on the first 60 rows" in model_card(card(recipe={"limit": 60}))


def test_use_passes_the_templates_kwargs_and_the_thinking_switch():
    text = model_card(card(template_kwargs={"header": False, "system": 'say "hi"\n```'}))
    code = re.search(r"^````python\n(.*?)\n````$", text, re.MULTILINE | re.DOTALL)
    assert code, "the fence is longer than what it holds"
    compile(code[1], "card", "exec")
    assert "    enable_thinking=True,\n    header=False,\n    system='say \"hi\"\\n```',\n" in code[1]
    assert "enable_thinking" not in model_card(card(has_thinking_switch=False))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(name=st.text(min_size=1), licence=st.text(min_size=1), value=st.text())
@example(name=EVIL, licence=EVIL, value=EVIL)
@example(name="---", licence="- x", value="1e-5")
@example(name="\x85", licence="\xa0", value="\x85")
def test_any_text_leaves_markdown_and_yaml_whole(name: str, licence: str, value: str):
    source = Source(name, "tuned", None, None, None, (name,), "e" * 64, licence, 1, 1, 1, 1, 1.0)
    recipe = {"name": "mine", "chat_template": {"kwargs": {"system": value}}}
    changes = {
        "base": Base(name, None, "d" * 64, licence),
        "sources": [source],
        "training": {"tuned": {"kind": licence}},
    }
    scores = [scored(name, "loss", 3, 1.0, 0.1, 0.5, 0.1)]
    text = model_card(
        card(
            **changes,
            scores=scores,
            cut_offs=[CutOff(name, 2, {"base": 1, "tuned": 1})],
            recipe=recipe,
            lineage=[(name, "a/b")],
        )
    )
    read = ModelCard(text)
    assert str(read) == text and read.data.eval_results[0].dataset_name == shown(name)
    body = text.partition("\n---\n")[2]
    (row,) = rows(body, "source | from")
    assert len(row) == 9 and row[0] == row[1] == shown(name) and row[3] == shown(licence)
    titles = [line for line in outside_fences(body) if line.startswith("#")]
    assert titles == ["# mine", "## Scores", "## Data", "## Training", "## Use", "## Recipe", "## Lineage"]
    fence = re.search(r"^(`{3,})yaml\n(.*?)\n\1$", body, re.MULTILINE | re.DOTALL)
    assert fence and read_yaml(fence[2]) == recipe


def shown(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def outside_fences(body: str) -> list[str]:
    found, fence = [], ""
    for line in body.split("\n"):
        ticks = re.match("`{3,}", line)
        if ticks and not fence:
            fence = ticks[0]
        elif fence:
            fence = "" if line == fence else fence
        else:
            found.append(line)
    assert not fence
    return found


def test_tasks_that_are_not_scored_are_named_and_nothing_is_said_of_them_in_the_metadata():
    text = model_card(card(not_scored=["two", "lm_eval:three"]))
    assert "**Not scored: two, lm_eval:three.** Their evaluation failed" in text
    assert {result.dataset_name for result in ModelCard(text).data.eval_results} == {"one"}
    assert "Not scored" not in model_card(card())
    bare = model_card(card(scores=[], cut_offs=[], gains=((), []), not_scored=["one"]))
    assert "Not scored: one" in bare and "| task |" not in bare and ModelCard(bare).data.eval_results is None


def test_scores_of_the_harness_name_it_and_no_source():
    found = scored("lm_eval:gsm8k", "exact_match,strict-match", 40, 0.25, 0.07, 0.5, 0.08)
    text = model_card(card(scores=[found], harness_version="0.4.13"))
    (result,) = ModelCard(text).data.eval_results
    assert (result.dataset_type, result.dataset_name, result.metric_value) == ("lm_eval:gsm8k", "lm_eval:gsm8k", 0.5)
    assert (result.dataset_config, result.dataset_revision) == (None, None)
    assert result.metric_name == "exact match,strict-match (lm_eval:gsm8k)"
    assert "lm-evaluation-harness (0.4.13)" in text and "lm-evaluation-harness" not in model_card(card())
    assert rows(text, "task | metric")[0][:3] == ["lm_eval:gsm8k", "exact match,strict-match", "40"]


def test_phases_have_a_column_each_their_changes_and_their_own_training():
    by_model = {"base": Value(0.1, 0.01), "mid": Value(0.2, 0.02), "sft": Value(0.5, 0.03)}
    change = {"task": "one", "metric": "exact_match", "phase": "sft", "before": "mid", "value": 0.3, "low": 0.2}
    text = model_card(
        card(
            scores=[Score("one", "exact_match", 100, by_model, (0.4, 0.3, 0.5), is_share=True)],
            phase_changes=[{**change, "high": 0.4}],
            cut_offs=[CutOff("one", 50, {"base": 40, "mid": 5, "sft": 1})],
            training={"mid": {"optimizer steps": 9}, "sft": {"optimizer steps": 7}},
        )
    )
    (row,) = rows(text, "task | metric | n | base | mid | sft | difference")
    assert [cell.split(" ")[0] for cell in row] == ["one", "exact", "100", "0.1000", "0.2000", "0.5000", "+0.4000"]
    assert rows(text, "task | metric | phase") == [["one", "exact match", "sft", "+0.3000 (+0.2000 to +0.4000)"]]
    assert rows(text, "task | answers | base | mid | sft") == [["one", "50", "80.0%", "10.0%", "2.0%"]]
    assert re.search(r"### Phase mid\n\n- optimizer steps: 9\n\n### Phase sft\n\n- optimizer steps: 7", text)
    (result,) = ModelCard(text).data.eval_results
    assert result.metric_value == 0.5, "of the model that is released"
