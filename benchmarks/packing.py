"""Packing speed and density: first-fit-decreasing beside numpy's sort of the same lengths and beside TRL's packing.

    python benchmarks/packing.py

TRL moves the tokens as it packs; ours writes a plan of offsets and moves none, which is why it can afford to pack a
whole mixture at once. Prints a table, and one JSON object as its last line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CAPACITY, SHORT_CAPACITY = 65_536, 8_192
NUM_ROWS, TRL_ROWS = 1_000_000, 20_000
RUNS = 9


def main() -> None:
    from sft_core.data.packing.plan import first_fit_decreasing
    from sft_core.report.tables import text_table

    lengths = reasoning_lengths(NUM_ROWS, CAPACITY, seed=0)
    first_fit_decreasing(lengths[:1000], CAPACITY)  # compiles
    argsort_s, ours_s = medians(
        lambda: np.argsort(-lengths, kind="stable"), lambda: first_fit_decreasing(lengths, CAPACITY), runs=RUNS
    )
    many = reasoning_lengths(5 * NUM_ROWS, CAPACITY, seed=1)
    (many_s,) = medians(lambda: first_fit_decreasing(many, CAPACITY), runs=3)
    trl = trl_seconds(lengths[:TRL_ROWS])
    whole = {setting: seconds for setting, seconds in trl.items() if setting[0] != "wrapped"}
    best = min(whole, key=lambda setting: whole[setting])
    ours_us, whole_us, any_us = (
        1e6 * seconds / rows
        for seconds, rows in ((ours_s, NUM_ROWS), (whole[best], TRL_ROWS), (min(trl.values()), TRL_ROWS))
    )

    rows = [
        ("ours: first-fit-decreasing", NUM_ROWS, ours_s, ours_us),
        ("ours, 5 M rows", len(many), many_s, 1e6 * many_s / len(many)),
        ('np.argsort(-lengths, kind="stable")', NUM_ROWS, argsort_s, 1e6 * argsort_s / NUM_ROWS),
        *(
            (
                f"TRL {strategy}, batches of {size}{note(strategy, (strategy, size) == best)}",
                TRL_ROWS,
                s,
                1e6 * s / TRL_ROWS,
            )
            for (strategy, size), s in trl.items()
        ),
    ]
    print(f"rows of {lengths.mean():.0f} tokens on average, packs of {CAPACITY}\n")
    print(text_table(("packing", "rows", "seconds", "microseconds a row"), rows))

    num_packs = int(first_fit_decreasing(lengths, CAPACITY).max()) + 1
    over_sum = num_packs / -(-int(lengths.sum()) // CAPACITY)
    kept = lengths[lengths <= SHORT_CAPACITY]
    short_packs = int(first_fit_decreasing(kept, SHORT_CAPACITY).max()) + 1
    over_l2 = short_packs / martello_toth_l2(kept, SHORT_CAPACITY)
    density = [
        (CAPACITY, len(lengths), num_packs, "total / capacity, rounded up", f"{over_sum:.6f}"),
        (SHORT_CAPACITY, len(kept), short_packs, "Martello-Toth L2, longer rows dropped", f"{over_l2:.6f}"),
    ]
    print("\n" + text_table(("packs of", "rows", "packs", "lower bound", "packs over the bound"), density))
    print(
        json.dumps(
            {
                "ratio_vs_trl": round(whole_us / ours_us, 1),
                "ratio_vs_trl_wrapped": round(any_us / ours_us, 1),
                "ratio_to_argsort": round(ours_s / argsort_s, 3),
                "bins_over_bound": round(over_sum, 6),
                "bins_over_l2": round(over_l2, 6),
                "seconds_1m": round(ours_s, 4),
                "seconds_5m": round(many_s, 3),
            }
        )
    )


def reasoning_lengths(num_rows: int, capacity: int, seed: int) -> np.ndarray:
    """Lengths as of chats and reasoning traces: int32, shape (rows,), clipped to [16, capacity].

    Four of five rows are lognormal (median 1,500, sigma 0.9), one of five is a long trace: Pareto from 6,000 tokens
    with index 1.3, so that at 65,536 one row in 110 is cut. Mean 5,000, median 2,000, nine tenths below 11,200.
    """
    rng = np.random.default_rng(seed)
    chats = rng.lognormal(np.log(1_500), 0.9, num_rows)
    traces = 6_000 * (1 + rng.pareto(1.3, num_rows))
    return np.clip(np.where(rng.random(num_rows) < 0.2, traces, chats), 16, capacity).astype(np.int32)


def martello_toth_l2(lengths: np.ndarray, capacity: int) -> int:
    """The lower bound L2 on the number of bins (Martello and Toth 1990, Lower bounds for the bin packing problem).

    For each threshold k: items over capacity - k share a bin with none of at least k; others over half of capacity
    stand in a bin each; what of the items from k to half does not fit beside the latter needs further bins.
    """
    number = np.bincount(lengths, minlength=capacity + 1)
    below = np.concatenate([[0], np.cumsum(number)])  # below[x]: items shorter than x
    tokens = np.concatenate([[0], np.cumsum(number * np.arange(capacity + 1))])
    half = capacity // 2
    k = np.arange(half + 1)
    beside = below[capacity - k + 1] - below[half + 1]
    room = beside * capacity - (tokens[capacity - k + 1] - tokens[half + 1])
    further = -(-(tokens[half + 1] - tokens[k] - room) // capacity)
    return int((below[-1] - below[half + 1] + np.maximum(0, further)).max())


def medians(*tasks: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of each, the median of runs; in turn, so that a machine whose speed drifts is fair to all."""
    seconds = [[timed(task) for task in tasks] for _ in range(runs)]
    return np.median(seconds, axis=0).tolist()


def timed(task: Callable[[], Any]) -> float:
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def trl_seconds(lengths: np.ndarray) -> dict[tuple[str, int], float]:
    """Seconds of trl.pack_dataset over rows of these lengths, by strategy and size of its batches.

    The dataset is in memory before, and so is what it makes; more than one process only made it slower (5 to 10
    times, for the tokens go from one to the other).
    """
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], np.int32)))
    dataset = datasets.Dataset(pa.table({"input_ids": ids}))
    settings = [(strategy, size) for strategy in ("bfd", "bfd_split", "wrapped") for size in (1_000, 5_000, TRL_ROWS)]
    pack_dataset(dataset.select(range(100)), CAPACITY)  # what is loaded at the first use

    def run(strategy: str, size: int) -> None:
        options = {"batch_size": size, "keep_in_memory": True, "load_from_cache_file": False}
        pack_dataset(dataset, CAPACITY, strategy, options)

    return dict(zip(settings, medians(*((lambda s=s: run(*s)) for s in settings), runs=3), strict=True))


def note(strategy: str, best: bool) -> str:
    return " (cuts rows in two)" if strategy == "wrapped" else " (its fastest)" if best else ""


if __name__ == "__main__":
    main()
