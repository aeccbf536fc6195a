"""Speed and memory of deduplication and decontamination, beside datasketch's own index of the same rows.

    python benchmarks/deduplication.py [ROWS]

Chats of some 400 words, one in twenty a copy of an earlier one and one in twenty a copy with changed words. Prints a
table, and one JSON object as its last line.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NUM_ROWS, PEER_ROWS = 50_000, 5_000
THRESHOLD, NGRAM, NUM_PERMUTATIONS = 0.8, 5, 128
SHARES = {"selection_share": 0.0, "report_share": 0.01}


def main() -> None:
    from sft_core.report.tables import text_table

    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_ROWS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(write_rows, folder, num_rows)
        cores = os.cpu_count() or 1
        work: list[tuple[str, int, Callable[..., dict[str, Any]], tuple[Any, ...]]] = [
            ("signatures, 1 process", num_rows, sign, (folder, "signed", 1)),
            (f"signatures, {cores} processes", num_rows, sign, (folder, "signed_by_all", cores)),
            ("duplicates", num_rows, find_duplicates, (folder,)),
            (f"contamination, {cores} processes", num_rows, find_contamination, (folder, cores)),
            ("datasketch: MinHash and MinHashLSH", PEER_ROWS, peer, (folder,)),
        ]
        measured = {}
        for label, rows, stage, arguments in work:
            measured[label] = alone(measure, stage, *arguments) | {"rows": rows}
    table = [
        (label, one["rows"], one["seconds"], round(one["rows"] / one["seconds"]), round(one["peak_mb"]))
        for label, one in measured.items()
    ]
    print(text_table(("stage", "rows", "seconds", "rows a second", "peak MB"), table))
    signed, by_all, duplicates, contamination, of_peer = measured.values()
    ours_us = 1e6 * (signed["seconds"] + duplicates["seconds"]) / num_rows
    print(
        json.dumps(
            {
                "rows": num_rows,
                "sign_rows_per_s": round(num_rows / signed["seconds"]),
                "sign_rows_per_s_all_cores": round(num_rows / by_all["seconds"]),
                "duplicates_rows_per_s": round(num_rows / duplicates["seconds"]),
                "duplicates_peak_mb": round(duplicates["peak_mb"]),
                "contamination_rows_per_s": round(num_rows / contamination["seconds"]),
                "ratio_vs_datasketch_index": round(1e6 * of_peer["seconds"] / PEER_ROWS / ours_us, 2),
                "found": duplicates["found"],
            }
        )
    )


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own, whose peak of memory is its own: a child's begins at what its parent had."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(stage: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Seconds, and the peak of this process and its workers, of one stage."""
    counts, seconds = stage(*arguments)
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"seconds": seconds, "peak_mb": max(peaks), "found": counts}


def write_rows(folder: Path, num_rows: int) -> None:
    """What download and tokenize leave of a source, as far as these stages read it."""
    from sft_core.data.shards.token_shards import INDEX
    from sft_core.data.sources.read import CONVERSATIONS, accept

    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{number:x}" for number in range(30_000)], object)
    (folder / "conversations").mkdir()
    (folder / "tokens" / "shard-00000").mkdir(parents=True)
    words: list[np.ndarray] = []
    index: dict[str, list[Any]] = {name: [] for name in INDEX.names}
    with pq.ParquetWriter(folder / "conversations" / "conversations.parquet", CONVERSATIONS) as writer:
        for start in range(0, num_rows, 500):
            group = []
            for row in range(start, min(start + 500, num_rows)):
                if row > 10 and row % 20 < 2:
                    own = words[rng.integers(0, len(words))].copy()
                    own[rng.integers(0, len(own), 5 * (row % 20))] = "changed"
                else:
                    own = vocabulary[np.minimum(rng.zipf(1.3, rng.integers(100, 700)), 30_000) - 1]
                words.append(own)
                cut = len(own) // 3
                said = [{"role": "user", "content": " ".join(own[:cut])}]
                said.append({"role": "assistant", "content": " ".join(own[cut:])})
                row_id, prompt_hash, text = accept({"messages": said}, "messages")
                group.append((str(row), row_id, prompt_hash, text))
                for name, value in zip(INDEX.names, (row_id, prompt_hash, None, 500, 300), strict=True):
                    index[name].append(value)
            writer.write_table(pa.table(list(map(list, zip(*group, strict=True))), schema=CONVERSATIONS))
    pq.write_table(pa.table(index, schema=INDEX), folder / "tokens" / "shard-00000" / "index.parquet")


def _build(out: Path, workers: int = 1, **inputs: Path) -> Any:
    from sft_core.recipe.sections import Runtime
    from sft_core.store.stage import Build

    out.mkdir()
    return Build(out, {name.replace("__", ":"): path for name, path in inputs.items()}, Runtime(num_workers=workers))


def sign(folder: Path, name: str, workers: int) -> tuple[dict[str, Any], float]:
    from sft_core.data.overlap.signatures import build_signatures

    build = _build(folder / name, workers, conversations=folder / "conversations")
    started = time.perf_counter()
    return build_signatures(build, ngram=NGRAM, num_permutations=NUM_PERMUTATIONS), time.perf_counter() - started


def find_duplicates(folder: Path) -> tuple[dict[str, Any], float]:
    from sft_core.data.overlap.deduplication import build_duplicates

    inputs = {"conversations__a": folder / "conversations", "signatures__a": folder / "signed"}
    build = _build(folder / "duplicates", **inputs, tokens__a=folder / "tokens")
    started = time.perf_counter()
    counts = build_duplicates(build, sources=["a"], ngram=NGRAM, threshold=THRESHOLD, **SHARES)
    return {key: counts[key] for key in ("exact", "near", "not_compared_with_all")}, time.perf_counter() - started


def find_contamination(folder: Path, workers: int) -> tuple[dict[str, Any], float]:
    from sft_core.data.overlap.decontamination import build_contamination
    from sft_core.data.overlap.report_prompts import build_report_prompts

    prompts = _build(folder / "prompts", conversations=folder / "conversations")
    build = _build(folder / "found", workers, conversations=folder / "conversations", prompts__a=folder / "prompts")
    started = time.perf_counter()
    build_report_prompts(prompts, **SHARES)
    counts = build_contamination(build, tasks=["a"], ngram=8, threshold=0.5, common_share=0.02, **SHARES)
    return {key: counts[key] for key in ("contaminated", "prompts")}, time.perf_counter() - started


def peer(folder: Path) -> tuple[dict[str, Any], float]:
    """The library's index as its documentation shows it: the first of similar rows is kept, nothing is verified."""
    from datasketch import MinHash, MinHashLSH

    from sft_core.data.overlap.stored_rows import read_places

    texts = [
        " ".join(message["content"] for message in conversation["messages"])
        for _, found in read_places(folder / "conversations", np.arange(PEER_ROWS))
        for conversation in found
    ]
    started = time.perf_counter()
    index, num_found = MinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERMUTATIONS), 0
    for number, text in enumerate(texts):
        words = text.split()
        sketch = MinHash(NUM_PERMUTATIONS)
        sketch.update_batch([" ".join(words[at : at + NGRAM]).encode() for at in range(len(words) - NGRAM + 1)])
        if index.query(sketch):
            num_found += 1
        else:
            index.insert(number, sketch)
    return {"found": num_found}, time.perf_counter() - started


if __name__ == "__main__":
    main()
