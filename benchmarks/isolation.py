"""Isolation: of every causal architecture in transformers, what packing does to the loss of a document.

    python benchmarks/isolation.py               # all of them, some five minutes on one core
    python benchmarks/isolation.py llama opt     # these

Each architecture is built small, with random weights, from its default config. The oracle is the textbook: each
document by itself, by its input ids alone. Beside it stand the loss as it is trained here, and the loss of the same
documents packed with restarting positions and nothing else, as stacks pack that do not try it out. Differences are
the largest of a token, in nats. Prints a table, and one JSON object as its last line; exits with 1 where ours differs.
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LENGTHS = (40, 9, 1, 71)  # tokens of the documents
EQUAL = 1e-3  # nats: what fp32 rounds in a model of random weights stays far below it


def main() -> None:
    import torch
    import transformers
    from tqdm import tqdm
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    from sft_core.report.tables import text_table

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = [row(kind) for kind in tqdm(sys.argv[1:] or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES], disable=None)]
    tried = [row for row in rows if row["ours"] is not None]
    print(
        text_table(
            ("architecture", "documents", "ours: nats", "positions alone: nats"),
            [(row["kind"], row["documents"], shown(row["ours"]), shown(row["positions"])) for row in rows],
        )
    )
    wrong = [row["kind"] for row in tried if row["ours"] > EQUAL]
    leaking = [row for row in tried if row["positions"] is None or row["positions"] > EQUAL]
    print(
        json.dumps(
            {
                "transformers": transformers.__version__,
                "architectures": len(rows),
                "tried": len(tried),
                "wrong": wrong,
                "leak_by_positions": len(leaking),
                "documents": collections.Counter(row["documents"] for row in rows),
            }
        )
    )
    sys.exit(bool(wrong))


def row(kind: str) -> dict[str, Any]:
    """kind, documents (how they are run here), and the two differences; None: it refuses what it is told."""
    import torch
    from transformers import AutoConfig

    from sft_core.train.collate import collate
    from sft_core.train.loss import Forward, trained_token_nll
    from sft_core.train.models.small import small_model
    from sft_core.train.probe import class_isolation

    try:
        config = AutoConfig.for_model(kind)
        model = small_model(config, attention=None, trust_remote_code=False)
    except Exception as error:  # a config without defaults
        return untried(kind, f"no default config: {type(error).__name__}")
    if model is None:
        return untried(kind, "not built")
    isolation = class_isolation(config, attention=None, trust_remote_code=False)
    assert isolation is not None
    documents = random_documents(model.config.get_text_config().vocab_size)
    batch = collate(documents)
    with torch.no_grad():
        try:
            expected = textbook_nll(model, documents)
        except Exception as error:  # an encoder, or a part of a model that wants more than tokens
            return untried(kind, f"not by ids alone: {type(error).__name__}")
        ours = trained_token_nll(model, batch, isolation.forward)
        try:
            by_positions = difference(trained_token_nll(model, batch, Forward("positions")), expected)
        except Exception:
            by_positions = None
    return {
        "kind": kind,
        "documents": f"together, by {isolation.document_inputs}" if isolation.document_inputs else "one a forward",
        "ours": difference(ours, expected),
        "positions": by_positions,
    }


def untried(kind: str, why: str) -> dict[str, Any]:
    return {"kind": kind, "documents": why, "ours": None, "positions": None}


def random_documents(vocabulary: int) -> list[Any]:
    from sft_core.data.shards.token_shards import TokenRow

    rng = np.random.default_rng(1)
    return [
        (TokenRow(rng.integers(0, vocabulary, length).astype(np.int32), np.ones(length, np.uint8)), number)
        for number, length in enumerate(LENGTHS)
    ]


def textbook_nll(model: Any, documents: list[Any]) -> Any:
    """Of each document by itself, all logits, labels shifted by one: float32, (trained tokens,)."""
    import torch
    import torch.nn.functional as F

    found = []
    for document, _ in documents:
        ids = torch.from_numpy(document.input_ids.astype(np.int64))[None]
        found.append(F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none"))
    return torch.cat(found)


def difference(found: Any, expected: Any) -> float:
    return float((found - expected).abs().max())


def shown(nats: float | None) -> str:
    return "-" if nats is None else f"{nats:.1g}" if nats > EQUAL else "0"


if __name__ == "__main__":
    main()
