"""Outputs that a card reads, without a run that makes them."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.evaluate.rows import ROWS, answer_counts, scores
from sft_core.store.manifest import KEY_HEX, MANIFEST, Identity, make_manifest, sha256_of
from sft_core.store.ref import Ref
from sft_core.store.store import Store


def saved(
    store: Store,
    stage: str,
    part: dict[str, Any],
    counts: dict[str, Any],
    *,
    section: dict[str, Any] | None = None,
    inputs: dict[str, Ref] | None = None,
) -> Ref:
    """An output of no files in the store, with a manifest as the store writes them."""
    identity: Identity = {"stage": stage, "part": part, "section": section or {}, "inputs": {}, "code": 1}
    ref = Ref(stage, sha256_of(identity)[:KEY_HEX])
    folder = store.root / stage / ref.key
    folder.mkdir(parents=True)
    manifest = make_manifest(ref, identity, {}, counts, inputs or {}, 1.0, None)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return ref


def saved_evaluation(
    store: Store,
    model: str,
    values: list[float],
    outputs: list[str],
    *,
    task: str,
    asked: list[str],
    wanted: list[str],
    cut_off: int = 0,
    engine: str | None = None,
) -> Ref:
    """An evaluation of rows that have these scores. cut_off: how many answers ended at the limit."""
    n = len(values)
    columns = {
        **{"row_id": [str(row) for row in range(n)], "prompt_hash": range(n), "nll": [3.0] * n},
        **{"num_trained": [2 + row % 3 for row in range(n)], "num_correct": [1] * n, "answer": wanted, "prompt": asked},
        **{"outputs": [[output] for output in outputs], "num_generated": [[7]] * n},
        **{"cut_off": [[row < cut_off] for row in range(n)], "scores": [[v] for v in values], "score": values},
    }
    table = pa.table(columns, schema=ROWS)
    found = [vars(score) for score in scores(table, "exact_match")]
    counts = {"rows": n, "over_long": 0, **answer_counts(table), "timeouts": 0, "metric": "exact_match"}
    ref = saved(store, "evaluated", {"task": task, "model": model}, {**counts, "scores": found, "engine": engine})
    pq.write_table(table, store.path(ref) / "rows.parquet")
    (store.path(ref) / "scores.json").write_text(json.dumps(found))
    return ref
