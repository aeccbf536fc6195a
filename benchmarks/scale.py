"""A million conversations through the data stages: the memory of each process, and whether a row's time stays the same.

    python benchmarks/scale.py
    python benchmarks/scale.py --rows 10000 100000

Distinct conversations of 300 tokens and more on average go from a JSON-lines file through download, render, tokenize,
mix and pack, on all cores, for the smallest and the largest number of rows (and those between). A row's time is what
the stages take more than for a thousand rows, by the rows that are more: loading libraries, a tokenizer and compiled
code is the same for any number, and takes longer than ten thousand rows do. So a thousand rows and the smallest number
are run several times, in turn, before and after the others, and their medians count. Memory is the resident set of each
process of the tree, ten times a second, libraries included.
A million rows take five minutes on two cores, and for that time 5 GB of disk in the folder for temporary files.
Prints a table, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NUM_ROWS, FEW = (10_000, 1_000_000), 1_001
NUM_WORDS, NUM_SENTENCES, VOCABULARY = 30_000, 40_000, 32_000
SENTENCES_A_TURN = 9
MAX_LENGTH = 8_192
STAGES = ("conversations", "rendered", "tokens", "mixture", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=NUM_ROWS)
    parser.add_argument("--run", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_stages(options.run)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), sorted(options.rows))


def compare(folder: Path, sizes: list[int]) -> None:
    from benchmarks.tokenization import CHATML, write_tokenizer
    from sft_core.report.tables import text_table

    sentences = list(make_sentences(random.Random(0)))
    (folder / "template.jinja").write_text(CHATML)
    few = [conversation(sentences, random.Random(-number)) for number in range(1, 2_000)]
    write_tokenizer(folder / "tokenizer", few, VOCABULARY)
    measure(folder, sentences, FEW)  # compiles the packing, which is kept
    runs_of = (*(FEW, sizes[0]) * 2, *sizes, *(FEW, sizes[0]) * 2, FEW, FEW)
    found = [(num_rows, measure(folder, sentences, num_rows)) for num_rows in runs_of]
    few = [one["seconds"] for num_rows, one in found if num_rows == FEW]
    fixed = {stage: statistics.median(seconds[stage] for seconds in few) for stage in few[0]}
    by_size = {size: [one for num_rows, one in found if num_rows == size] for size in sizes}
    per_row = {
        size: {
            stage: statistics.median(one["seconds"][stage] - fixed[stage] for one in runs) / (size - FEW)
            for stage in (*STAGES, "all")
        }
        for size, runs in by_size.items()
    }
    rows = [
        (size, stage, by_size[size][0]["seconds"][stage], 1e6 * seconds)
        for size, stages in per_row.items()
        for stage, seconds in stages.items()
    ]
    print("\n" + text_table(("rows", "stage", "seconds", "microseconds a row"), rows))
    last = by_size[sizes[-1]][0]
    peak = max(one["peak_rss"] for _, one in found)
    print(f"\n{last['tokens'] / sizes[-1]:.0f} tokens a row, {os.cpu_count()} cores")
    growth = {stage: per_row[sizes[-1]][stage] / per_row[sizes[0]][stage] - 1 for stage in (*STAGES, "all")}
    print(
        json.dumps(
            {
                "peak_rss_gib": round(peak / 2**30, 3),
                "time_per_row_growth": round(growth["all"], 3),
                "rows": sizes[-1],
                "seconds": round(last["seconds"]["all"], 1),
                "tokens_a_row": round(last["tokens"] / sizes[-1], 1),
                "peak_rss_gib_by_stage": {name: round(size / 2**30, 3) for name, size in last["rss"].items()},
            }
        )
    )


# What goes in


def make_sentences(rng: random.Random) -> Iterator[str]:
    """Of made-up words, as frequent as Zipf has it."""
    letters = "etaoinshrdlucmfwygpb"
    words = ["".join(rng.choices(letters, range(len(letters), 0, -1), k=rng.randint(1, 9))) for _ in range(NUM_WORDS)]
    weights = [1 / rank for rank in range(1, NUM_WORDS + 1)]
    for _ in range(NUM_SENTENCES):
        yield " ".join(rng.choices(words, weights, k=rng.randint(6, 18))).capitalize() + "."


def conversation(sentences: list[str], rng: random.Random) -> dict[str, Any]:
    """One or two exchanges; nine sentences of so many are never the same twice."""
    roles = ("user", "assistant") * rng.randint(1, 2)
    contents = (
        " ".join(rng.choices(sentences, k=rng.randint(1, SENTENCES_A_TURN * (1 + place % 2))))
        for place in range(len(roles))
    )
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]}


def write_rows(path: Path, sentences: list[str], num_rows: int) -> None:
    from tqdm import tqdm

    rng = random.Random(num_rows)
    with path.open("w", encoding="utf-8") as file:
        for _ in tqdm(range(num_rows), unit=" rows", disable=None, desc=f"writing {num_rows} rows"):
            file.write(json.dumps(conversation(sentences, rng)) + "\n")


# A run


def measure(folder: Path, sentences: list[str], num_rows: int) -> dict[str, Any]:
    """Seconds of each stage and the largest resident set of any process, by stage and over all."""
    write_rows(folder / "rows.jsonl", sentences, num_rows)
    command = [sys.executable, __file__, "--run", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watch = Watch(process.pid)
        lines = []
        for line in process.stdout:
            lines.append(json.loads(line))
            watch.stage = lines[-1].get("next")
        watch.stop()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = {line["stage"]: line["seconds"] for line in lines if "stage" in line}
    seconds["all"] = sum(seconds.values())
    return {
        "seconds": seconds,
        "tokens": lines[-1]["tokens"],
        "rss": watch.peaks,
        "peak_rss": max(watch.peaks.values()),
    }


class Watch:
    """Samples the memory of a process and all that it started, while a stage runs."""

    def __init__(self, pid: int):
        self.stage: str | None = None
        self.peaks: dict[str, int] = {}
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        import psutil

        while not self._is_over.wait(0.1):
            try:
                process = psutil.Process(self._pid)
                processes = [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for one in processes:
                try:
                    size = one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
                if self.stage is not None:
                    self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), size)


def run_stages(folder: Path) -> None:
    """Builds each stage in a new store; prints a line for each, and what comes next."""
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe
    from sft_core.store.store import Store
    from steps.download import CONVERSATIONS
    from steps.mix import MIXTURE
    from steps.pack import PACKED
    from steps.render import RENDERED
    from steps.tokenize import TOKENS

    recipe = parse_recipe(
        {
            "name": "scale",
            "model": {"config": {"model_type": "llama"}, "tokenizer_name_or_path": str(folder / "tokenizer")},
            "chat_template": {"template": str(folder / "template.jinja")},
            "dataset_mixture": {"datasets": [{"name": "rows", "path": str(folder / "rows.jsonl")}]},
            "packing": {"max_length": MAX_LENGTH},
        }
    )
    parts: dict[str, dict[str, str]] = {stage: {"source": "rows"} for stage in STAGES[:3]}
    counts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder) as root:
        store, pinned = Store(root), pin(recipe)
        for stage in (CONVERSATIONS, RENDERED, TOKENS, MIXTURE, PACKED):
            print(json.dumps({"next": stage.name}), flush=True)
            started = time.perf_counter()
            ref = store.ensure(stage, pinned, **parts.get(stage.name, {}))
            print(json.dumps({"stage": stage.name, "seconds": time.perf_counter() - started}), flush=True)
            counts[stage.name] = store.manifest(ref)["counts"]
    print(json.dumps({"tokens": counts["tokens"]["tokens"], "rows": counts["tokens"]["rows"]}), flush=True)


if __name__ == "__main__":
    main()
