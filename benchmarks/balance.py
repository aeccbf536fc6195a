"""Balance: how much longer the slowest rank works than the mean one, our order of packs beside plain shuffling and TRL.

    python benchmarks/balance.py

A step takes as long as its slowest rank. Costs are training FLOPs of an 8 B model on packs of 65,536 tokens, 128 packs
a global batch (64 ranks take 2 each, 8 ranks 16). TRL packs by best-fit-decreasing 1,000 rows at a time, and shuffles.
Prints a table, and one JSON object as its last line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CAPACITY, GLOBAL_BATCH = 65_536, 128
NUM_ROWS = 200_000
LINEAR, QUADRATIC = 6 * 8e9, 6 * 32 * 4096  # 8 B parameters; 32 layers of width 4,096
RANKS = (8, 64)


def main() -> None:
    from benchmarks.packing import reasoning_lengths
    from sft_core.data.packing.balance import pack_costs
    from sft_core.data.packing.plan import PackPlan
    from sft_core.report.tables import text_table
    from sft_core.train.schedule import step_packs

    lengths = reasoning_lengths(NUM_ROWS, CAPACITY, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        write_plan(lengths, Path(folder))
        plan = PackPlan.read(Path(folder))
    costs = pack_costs(plan.num_tokens, plan.offsets, linear=LINEAR, quadratic=QUADRATIC)
    schedule = step_packs(costs, global_batch_size=GLOBAL_BATCH, num_epochs=1, max_steps=None, seed=0)
    slots = schedule.ravel()[: len(plan)]  # what is left are empty slots of the last batch
    rows_once = bool(
        (np.sort(plan.row) == np.arange(NUM_ROWS)).all()
        and (plan.num_tokens == lengths[plan.row]).all()
        and (np.sort(slots) == np.arange(len(plan))).all()
    )
    rng = np.random.default_rng(0)
    of_trl = trl_costs(lengths)
    orders = {
        "ours: packs of like cost together": costs[slots],
        "our packs, shuffled": rng.permutation(costs),
        "TRL: bfd, shuffled": rng.permutation(of_trl),
    }
    rows = [
        (name, len(ordered), *(slowest_over_mean(ordered, ranks) for ranks in RANKS),
         *(slowest_over_mean(ordered, ranks, each_micro_step=True) for ranks in RANKS))
        for name, ordered in orders.items()
    ]  # fmt: skip
    header = ("slowest rank / mean rank", "packs", "8 ranks", "64 ranks", "8, each micro-step", "64, each micro-step")
    print(text_table(header, rows))
    print(
        json.dumps(
            {
                **{f"balance_{ranks}": round(rows[0][2 + i], 4) for i, ranks in enumerate(RANKS)},
                "rows_once": rows_once,
                **{f"shuffled_{ranks}": round(rows[1][2 + i], 4) for i, ranks in enumerate(RANKS)},
                **{f"trl_{ranks}": round(rows[2][2 + i], 4) for i, ranks in enumerate(RANKS)},
            }
        )
    )


def slowest_over_mean(costs: np.ndarray, num_ranks: int, *, each_micro_step: bool = False) -> float:
    """Mean over full steps of the slowest rank's cost over the mean one's: rank r has the slots j * ranks + r.

    each_micro_step: ranks wait at every micro-step, as under FSDP and ZeRO-3, not only at the end of a step.
    """
    num_steps = len(costs) // GLOBAL_BATCH
    of_ranks = costs[: num_steps * GLOBAL_BATCH].reshape(num_steps, -1, num_ranks)
    if each_micro_step:
        return float((of_ranks.max(axis=2).sum(axis=1) / of_ranks.mean(axis=2).sum(axis=1)).mean())
    sums = of_ranks.sum(axis=1)
    return float((sums.max(axis=1) / sums.mean(axis=1)).mean())


def write_plan(lengths: np.ndarray, folder: Path) -> None:
    """packs.parquet as the pack step writes it, of a mixture of all rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sft_core.data.mixing.mixture import MIXTURE
    from sft_core.data.packing.plan import build_packs
    from sft_core.recipe.sections import Runtime
    from sft_core.store.stage import Build

    columns = {"row": np.arange(len(lengths)), "num_tokens": lengths}
    zeros = np.zeros(len(lengths), np.int64)
    mixture = pa.table({name: columns.get(name, zeros) for name in MIXTURE.names}).cast(MIXTURE)
    pq.write_table(mixture, folder / "mixture.parquet")
    build_packs(
        Build(folder, {"mixture": folder}, Runtime()),
        sources=["rows"],
        packing_strategy="ffd",
        max_length=CAPACITY,
        over_long="error",
        loss_scope="assistant",
    )


def trl_costs(lengths: np.ndarray) -> np.ndarray:
    """Costs of the packs that TRL makes of rows of these lengths, at its own settings; a token is one byte here."""
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    from sft_core.data.packing.balance import pack_costs

    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], np.int8)))
    dataset = datasets.Dataset(pa.table({"input_ids": ids}))
    packed = pack_dataset(dataset, CAPACITY, map_kwargs={"keep_in_memory": True, "load_from_cache_file": False})
    documents = packed.data.column("seq_lengths").combine_chunks()
    assert len(documents.flatten()) == len(lengths)
    ends = np.cumsum(documents.value_lengths().to_numpy())
    starts = np.concatenate([[0], ends])
    return pack_costs(documents.flatten().to_numpy(), starts, linear=LINEAR, quadratic=QUADRATIC)


if __name__ == "__main__":
    main()
