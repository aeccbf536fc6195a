"""configs/msft/make_data.py: rows as the hub has them become questions with one answer, read from a hub on loopback."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sft_core.data.sources.read import accept
from sft_core.recipe.parse import load_recipe
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "configs" / "msft" / "make_data.py"


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHOICES = {"text": ["a shirt", "a flask"], "label": ["1", "2"]}
# A row of each task in the hub's columns, the last line of its prompt's options, what is thought, and the answer.
ROWS: list[tuple[str, dict[str, Any], str | None, str | None, str]] = [
    ("gsm8k", {"question": "6000 / 5?", "answer": "6000/5=1200\n#### 1,200"}, None, "6000/5=1200", "1200"),
    (
        "aqua_rat",
        {"question": "3 * 7?", "options": ["A)20", "B)21"], "rationale": "3 * 7 = 21", "correct": "B"},
        "B. 21",
        "3 * 7 = 21",
        "B",
    ),
    ("arc_easy", {"question": "What holds water?", "choices": CHOICES, "answerKey": "2"}, "B. a flask", None, "B"),
    ("commonsense_qa", {"question": "What is worn?", "choices": CHOICES, "answerKey": "1"}, "B. a flask", None, "A"),
    ("openbookqa", {"question_stem": "It is worn", "choices": CHOICES, "answerKey": "1"}, "B. a flask", None, "A"),
    (
        "sciq",
        {
            "question": "What do plants take in?",
            "correct_answer": "light",
            **{"distractor1": "oil", "distractor2": "ash", "distractor3": "sand"},
        },
        "D. sand",
        None,
        "B",
    ),
    (
        "winogrande",
        {"sentence": "The cup does not fit as the _ is small.", "option1": "cup", "option2": "box", "answer": "2"},
        "B. box",
        None,
        "B",
    ),
    ("boolq", {"question": "is ice cold", "passage": "Ice is frozen.", "answer": True}, None, None, "yes"),
    ("hellaswag", {"ctx": "He jumps and", "endings": ["a", "b", "c", "d"], "label": "2"}, "D. d", None, "C"),
    (
        "medmcqa",
        {"question": "Which bone?", "opa": "ulna", "opb": "femur", "opc": "rib", "opd": "skull", "cop": 1},
        "D. skull",
        None,
        "B",
    ),
]


@pytest.mark.parametrize(("task", "row", "option", "thought", "answer"), ROWS, ids=[one[0] for one in ROWS])
def test_row_becomes_a_question_with_its_answer(
    make_data: ModuleType, task: str, row: dict[str, Any], option: str | None, thought: str | None, answer: str
):
    found = make_data.TASKS[task].convert(row)
    prompt, reply = found["messages"]
    assert (found["answer"], reply["content"], reply.get("reasoning_content")) == (answer, answer, thought)
    assert found["chat_template_kwargs"] == {"enable_thinking": thought is not None}
    assert option is None or prompt["content"].splitlines()[-2] == option
    assert accept(found, "auto").prompt_hash


UNKNOWN = [
    ("winogrande", {"sentence": "_", "option1": "a", "option2": "b", "answer": ""}),  # as its test split
    ("hellaswag", {"ctx": "x", "endings": ["a", "b", "c", "d"], "label": ""}),
    ("medmcqa", {"question": "x", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": -1}),
    ("commonsense_qa", {"question": "x", "choices": CHOICES, "answerKey": ""}),
]


@pytest.mark.parametrize(("task", "row"), UNKNOWN, ids=[task for task, _ in UNKNOWN])
def test_row_without_a_known_answer_is_left_out(make_data: ModuleType, task: str, row: dict[str, Any]):
    assert list(make_data.converted([row], make_data.TASKS[task].convert)) == []


def test_recipe_trains_on_the_files_that_the_script_writes(make_data: ModuleType):
    recipe = load_recipe(ROOT / "configs" / "msft-paper.yaml")
    paths = [path for dataset in recipe.last_phase.dataset_mixture.datasets for path in dataset.paths]
    assert paths == [f"data/msft/{task}.jsonl" for task in make_data.TASKS] and len({*paths}) == 10


@pytest.mark.slow
def test_script_reads_the_hub_and_says_when_rows_are_too_few(tmp_path: Path):
    rows = [{"question": f"{number} + 1?", "answer": f"#### {number + 1}"} for number in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, *rows])
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
    with HubServer() as server:
        server.publish("datasets", "openai/gsm8k", {"README.md": card.encode(), "train.jsonl": lines.encode()})

        def run(num_rows: int) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--task", "gsm8k", "--rows", str(num_rows)]
            return subprocess.run(command, env=server.environment(tmp_path), capture_output=True, text=True)

        refused, done = run(13), run(12)
    assert refused.returncode == 1 and "gsm8k: found 12 questions with an answer in openai/gsm8k" in refused.stderr
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in (tmp_path / "gsm8k.jsonl").read_text().splitlines()]
    assert sorted(int(row["answer"]) for row in written) == list(range(1, 13))
    assert [row["answer"] for row in written] != [str(number) for number in range(1, 13)], "in the hub's order"
