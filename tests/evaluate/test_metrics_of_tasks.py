"""Metrics and sampling through the real stages: a model's outputs, the conversations, the tool calls of a template."""

import json
from pathlib import Path
from typing import Any

import pytest

from sft_core.data.shards.token_shards import read_index
from sft_core.evaluate.metrics.registry import load_metric
from sft_core.evaluate.rows import of_samples, read_rows
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps.evaluate import EVALUATED
from tests.evaluate.test_evaluated import TASK, evaluate_checkpoint, pinned, store, tokens, writes_four
from tests.train.tiny import tiny_recipe

__all__ = ["pinned", "store", "tokens", "writes_four"]  # fixtures
CALL = {"name": "get_stock", "arguments": {"item": "pen", "most": 3}}
SAMPLING = {"temperature": 2.0, "top_p": 0.9, "top_k": 40, "seed": 3, "num_samples": 3}


def evaluated(store: Store, evaluation: dict[str, Any], task: str = TASK, **changes: Any) -> tuple[Path, dict]:
    recipe = parse_recipe(tiny_recipe(evaluation={"max_rows": 12, "max_new_tokens": 5, **evaluation}, **changes))
    ref = store.ensure(EVALUATED, pin(recipe), model="base", task=task)
    return store.path(ref), store.manifest(ref)["counts"]


@pytest.mark.slow
def test_numeric_task_scores_what_the_model_wrote(
    writes_four: Path, tokens: Path, pinned: PinnedRecipe, tmp_path: Path
) -> None:
    rows = evaluate_checkpoint(pinned, tokens, writes_four, tmp_path / "out", max_rows=100, metric={"name": "numeric"})
    assert set(of_samples(rows, "outputs")) == {"4"}
    wanted = rows["answer"].to_pylist()
    assert 1 <= wanted.count("4") < len(wanted)
    assert rows["score"].to_pylist() == [float(answer == "4") for answer in wanted]
    assert json.loads((tmp_path / "out" / "scores.json").read_text())[-1]["metric"] == "numeric"


def test_answer_that_the_metric_cannot_read_is_refused_with_its_row(
    writes_four: Path, tokens: Path, pinned: PinnedRecipe, tmp_path: Path
) -> None:
    ids = read_index(tokens)["row_id"].to_pylist()
    with pytest.raises(ValueError, match=r"row [0-9a-f]{16}: found '.'; choice wants the letter") as raised:
        evaluate_checkpoint(pinned, tokens, writes_four, tmp_path / "out", metric={"name": "choice"})
    assert str(raised.value)[4:20] in ids


@pytest.mark.slow
def test_function_task_is_given_conversations_and_its_rows_have_fractions(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def half(output, answer, row):\n    assert row['answer'] == answer\n"
    source += "    assert answer in row['messages'][-1]['content'] and len(row['row_id']) == 16\n    return 0.5\n"
    (tmp_path / "mine_half.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    evaluation = {"metric_by_task": {TASK: "mine_half:half"}}
    folder, counts = evaluated(store, evaluation)
    assert read_rows(folder)["score"].to_pylist() == [0.5] * 12
    assert counts["scores"][-1] == {"metric": "mine_half:half", "value": 0.5, "stderr": 0.0, "n": 12}
    (tmp_path / "mine_half.py").write_text(source.replace("return 0.5", "return 0.25"))
    again, _ = evaluated(store, evaluation)
    assert again != folder, "an edited function is scored again"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dataset_mixture": {"datasets": [{"path": str(path)}], "report_share": 0.5}}


def asked(n: int, said: dict[str, Any], **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"How many pens, {n}?"}, {"role": "assistant", **said}]
    return {"messages": turns, "chat_template_kwargs": {"enable_thinking": False}, **more}


@pytest.mark.parametrize("style", ["xml", "python"])
def test_tool_call_task_wants_the_calls_that_the_template_trains(store: Store, tmp_path: Path, style: str) -> None:
    rows = [asked(n, {"content": "", "tool_calls": [{"function": CALL}]}) for n in range(20)]
    rows += [asked(n, {"content": "None."}) for n in range(20, 30)]
    changes = write_rows(tmp_path / f"{style}.jsonl", rows)
    changes["chat_template"] = {"kwargs": {"header": False, "tool_style": style}}
    folder, counts = evaluated(store, {"max_rows": 40, "metric_by_task": {style: "tool_call"}}, style, **changes)
    table = read_rows(folder)
    called = [row for row in table.to_pylist() if row["score"] is not None]
    assert 4 < len(called) < table.num_rows == counts["rows"]
    assert all(json.loads(row["answer"]) == CALL for row in called)


def test_tool_call_task_without_calls_is_an_error(store: Store, tmp_path: Path) -> None:
    changes = write_rows(tmp_path / "quiet.jsonl", [asked(n, {"content": "None."}) for n in range(20)])
    with pytest.raises(ValueError, match=r"tool_call finds nothing to ask .* no last turn calls a tool"):
        evaluated(store, {"metric_by_task": {"quiet": "tool_call"}}, "quiet", **changes)


@pytest.mark.slow
def test_task_without_answers_has_losses_alone_unless_its_metric_is_named(store: Store, tmp_path: Path) -> None:
    changes = write_rows(tmp_path / "plain.jsonl", [asked(n, {"content": "None."}) for n in range(20)])
    _, counts = evaluated(store, {}, "plain", **changes)
    assert counts["answers"] == 0 < counts["rows"]
    assert [score["metric"] for score in counts["scores"]] == ["loss", "perplexity", "token_accuracy"]
    with pytest.raises(
        ValueError, match=r"numeric finds nothing to ask in the task's \d+ report rows: none has an answer\n"
    ):
        evaluated(store, {"metric_by_task": {"plain": "numeric"}}, "plain", **changes)


@pytest.mark.slow
def test_reasoning_gym_task_reads_the_item_from_the_rows_answer(store: Store, tmp_path: Path) -> None:
    import reasoning_gym

    items = list(reasoning_gym.create_dataset("chain_sum", size=20, seed=1))
    rows = [asked(n, {"content": item["answer"]}, answer=dict(item)) for n, item in enumerate(items)]
    changes = write_rows(tmp_path / "sums.jsonl", rows)
    folder, counts = evaluated(store, {"metric_by_task": {"sums": "reasoning_gym"}}, "sums", **changes)
    assert set(read_rows(folder)["answer"].to_pylist()) <= {item["answer"] for item in items}
    assert counts["scores"][-1]["metric"] == "reasoning_gym" and counts["answers"] == counts["rows"] > 3


def test_sampled_task_has_the_mean_over_samples_of_each_row(store: Store) -> None:
    folder, counts = evaluated(store, {"metric_by_task": {TASK: "json"}, "sampling": SAMPLING})
    rows = read_rows(folder).to_pylist()
    assert counts["answers"] == 36 and counts["scores"][-1]["n"] == 12
    json_metric = load_metric({"name": "json"})
    for row in rows:
        assert [len(row[name]) for name in ("outputs", "num_generated", "cut_off", "scores")] == [3] * 4
        assert row["scores"] == [json_metric.score(output, None) for output in row["outputs"]]
        assert row["score"] == sum(row["scores"]) / 3
    assert any(len(set(row["outputs"])) > 1 for row in rows)
    assert counts["cut_off"] == sum(sum(row["cut_off"]) for row in rows)


@pytest.mark.slow
def test_sampled_task_is_the_same_in_other_batches_beside_other_rows_and_with_fewer_samples(
    store: Store, tokens: Path, tmp_path: Path
) -> None:
    folder, _ = evaluated(store, {"metric_by_task": {TASK: "json"}, "sampling": SAMPLING})
    wanted = read_rows(folder)["outputs"].to_pylist()
    other = Store(tmp_path / "store")  # batches are no part of the key
    runtime = {"runtime": {"eval_batch_size": 5}}
    again, _ = evaluated(other, {"metric_by_task": {TASK: "json"}, "sampling": SAMPLING}, **runtime)
    assert read_rows(again)["outputs"].to_pylist() == wanted
    two = {"sampling": {**SAMPLING, "num_samples": 2}, "max_rows": 7}
    fewer, _ = evaluated(store, {"metric_by_task": {TASK: "json"}, **two})
    assert read_rows(fewer)["outputs"].to_pylist() == [outputs[:2] for outputs in wanted[:7]]
    by_row = dict(zip(read_rows(folder)["row_id"].to_pylist(), wanted, strict=True))
    lengths = dict(zip(*(read_index(tokens)[name].to_pylist() for name in ("row_id", "num_tokens")), strict=True))
    middle = sorted(lengths[row_id] for row_id in by_row)[6]
    short, counts = evaluated(
        store, {"metric_by_task": {TASK: "json"}, "sampling": SAMPLING}, packing={"max_length": middle}
    )
    assert counts["over_long"] > 0, "rows have other places than they had"
    found = dict(zip(*(read_rows(short)[name].to_pylist() for name in ("row_id", "outputs")), strict=True))
    shared = found.keys() & by_row.keys()
    assert len(shared) > 4 and {row_id: found[row_id] for row_id in shared} == {
        row_id: by_row[row_id] for row_id in shared
    }
    reseeded, _ = evaluated(store, {"metric_by_task": {TASK: "json"}, "sampling": {**SAMPLING, "seed": 4}})
    assert read_rows(reseeded)["outputs"].to_pylist() != wanted
