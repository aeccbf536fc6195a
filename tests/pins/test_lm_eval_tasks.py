"""What the names of lm-eval tasks stand for: every change of it is another digest, and a wrong name is refused."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.lm_eval_tasks import digest_task, pin_tasks

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name in ("red", "blue"):
        (tasks / f"{name}.jsonl").write_text('{"text": "a"}\n')
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, data=tasks / f"{name}.jsonl"))
    (tasks / "functions.py").write_text("def upper(doc):\n    return doc['text'].upper()\n")
    (tasks / "red.yaml").open("a").write("process_docs: !function functions.upper\n")
    (tasks / "colours.yaml").write_text("group: colours\ntask: [red, blue]\n")
    return tasks


def digests(folder: Path, *names: str, **more: Any) -> dict[str, str]:
    pinned = pin_tasks(names, str(folder), more.pop("num_fewshot", None))
    assert pinned["version"] == importlib.metadata.version("lm_eval")
    return {name: task["digest"] for name, task in pinned["tasks"].items()}


@pytest.mark.parametrize(
    ("file", "more", "changed"),
    [
        ("red.yaml", "description: more\n", {"red", "colours"}),
        ("red.jsonl", '{"text": "b"}\n', {"red", "colours"}),
        ("functions.py", "LIMIT = 1\n", {"red", "blue", "colours"}),  # who imports it is not followed
        ("colours.yaml", "aggregate_metric_list: [{metric: exact_match}]\n", {"colours"}),
    ],
)
def test_digest_changes_with_configs_code_and_data(folder: Path, file: str, more: str, changed: set[str]) -> None:
    names = ("red", "blue", "colours")
    before = digests(folder, *names)
    assert len({*before.values()}) == 3
    (folder / file).open("a").write(more)
    after = digests(folder, *names)
    assert {name for name in names if before[name] != after[name]} == changed
    assert all(digest_task(name, str(folder), []) == after[name] for name in names)


def test_digest_of_a_moved_folder_is_the_same(folder: Path) -> None:
    before = digests(folder, "red")
    moved = shutil.move(folder, folder.parent / "moved")
    text = (moved / "red.yaml").read_text()
    assert str(folder) in text
    (moved / "red.yaml").write_text(text.replace(str(folder), str(moved)))
    assert digests(moved, "red") == before


@pytest.mark.slow
def test_unknown_name_is_refused_with_the_nearest(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.lm_eval\.tasks: found 'gsm8kk'; lm-eval knows .*'gsm8k'"):
        pin_tasks(["red", "gsm8kk"], str(folder), None)
    with pytest.raises(ValueError, match=r"found '@@@'; lm-eval knows no such task; `lm-eval ls tasks` lists them$"):
        pin_tasks(["@@@"], str(folder), None)


@pytest.mark.slow
def test_task_of_the_harness_is_found_with_its_folder_and_read_from_there_alone() -> None:
    pinned = pin_tasks(["gsm8k"], None, None)["tasks"]["gsm8k"]
    assert pinned["folders"] == ["gsm8k"]
    assert digest_task("gsm8k", None, pinned["folders"]) == pinned["digest"]


def test_missing_folder_and_data_are_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"include_path: found '/none'; no such folder"):
        pin_tasks(["red"], "/none", None)
    (folder / "red.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"a task reads .*red\.jsonl; no such file"):
        pin_tasks(["red"], str(folder), None)


def test_what_cannot_be_run_as_asked_is_refused(folder: Path) -> None:
    (folder / "red.yaml").open("a").write("num_fewshot: 0\n")
    with pytest.raises(ValueError, match="the config of red fixes it at 0"):
        pin_tasks(["red"], str(folder), 2)
    (folder / "blue.yaml").open("a").write("unsafe_code: true\n")
    with pytest.raises(ValueError, match="blue runs code that the model writes"):
        pin_tasks(["colours"], str(folder), None)


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "lm_eval":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=r"pip install 'sft-flow\[eval\]'"):
        pin_tasks(["red"], str(folder), None)


@pytest.mark.slow
def test_pinning_imports_no_torch(folder: Path) -> None:
    code = f"import sys; from sft_core.pins.lm_eval_tasks import pin_tasks; pin_tasks(['red'], {str(folder)!r}, None); "
    subprocess.run(
        [sys.executable, "-c", code + "assert 'lm_eval' in sys.modules and 'torch' not in sys.modules"], check=True
    )
