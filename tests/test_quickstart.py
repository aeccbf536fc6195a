"""The quickstart's data: held-out prompts that training never sees, and as many rows with thinking as without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from sft_core.data.sources import splits
from sft_core.data.sources.formats.conversations import canonical
from sft_core.recipe.parse import load_recipe

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "quickstart"


def prompts_by_split() -> dict[str, dict[str, set[int]]]:
    """{source: {split: prompt hashes}}"""
    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml")
    mixture = recipe.last_phase.dataset_mixture
    found = {}
    for dataset in mixture.datasets:
        lines = (ROOT / dataset.paths[0]).read_text().splitlines()
        hashes = np.array([splits.prompt_hash(canonical(json.loads(line))) for line in lines], dtype=np.uint64)
        assert len(set(hashes.tolist())) == len(lines), f"{dataset.source}: no prompt twice"
        split = splits.assign(hashes, selection_share=mixture.selection_share, report_share=mixture.report_share)
        found[dataset.source] = {
            name: set(hashes[split == number].tolist()) for number, name in enumerate(splits.NAMES)
        }
    return found


def test_report_prompts_are_many_and_in_no_training_row() -> None:
    sources = prompts_by_split()
    assert len(sources) >= 6
    trained = set().union(*(one["train"] for one in sources.values()))
    for name, one in sources.items():
        assert len(one["report"]) >= 200, name
        assert not one["report"] & trained, name


def test_thinking_twins_have_the_same_rows_in_every_split() -> None:
    sources = prompts_by_split()
    twins = [name for name in sources if name.endswith("_think") and name.replace("_think", "_no_think") in sources]
    twins = [name for name in twins if not name.endswith("_no_think")]
    assert twins
    for name in twins:
        assert sources[name] == sources[name.removesuffix("_think") + "_no_think"]


def test_script_writes_the_committed_bytes(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "make_quickstart.py", tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "make_quickstart.py")], check=True, capture_output=True)
    written = [path for path in sorted(tmp_path.rglob("*")) if path.is_file() and path.suffix in (".json", ".jsonl")]
    assert len(written) >= 10
    for path in written:
        assert path.read_bytes() == (FOLDER / path.relative_to(tmp_path)).read_bytes(), path.name
