"""The tokenize stage: rendered rows as token shards, proved row by row against what the conversation says.

Invariant: a mask changes only where a piece ends, and pieces are encoded one by one, so no token straddles
the border between what is trained and what is not.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data.proof.mask import MaskProof
from sft_core.data.rendering.build import chat_template
from sft_core.data.rendering.policy import RowPolicy
from sft_core.data.shards.parallel import Shard, build_shards, plan_shards, shard_folder, total
from sft_core.data.shards.token_shards import INDEX, TOKENS
from sft_core.data.tokenizer.encoded import EncodedRows, encode_rows
from sft_core.data.tokenizer.tokenizer import PieceEncoder, load_tokenizer
from sft_core.data.tokenizer.tokenizer import stop_tokens as all_stop_tokens
from sft_core.data.tokens.lengths import by_length
from sft_core.data.tokens.sample import first_row

if TYPE_CHECKING:
    from sft_core.store.stage import Build


def build_tokens(
    build: Build,
    *,
    tokenizer: dict[str, Any],
    template: dict[str, Any],
    stop_tokens: list[str],
    policy: dict[str, str],
) -> dict[str, Any]:
    """Writes shards of tokens.arrow and index.parquet: one row for each rendered row, in the same order.

    Counts what became of the source's rows in the steps before as well, and holds a row of it to look at.
    Raises MaskProofFailed when a row does not train exactly what its conversation says, with that row.
    """
    conversations = build.inputs["conversations"] / "conversations.parquet"
    with pq.ParquetFile(conversations) as file:
        shards = plan_shards(file.num_row_groups)
    work = functools.partial(
        _start, conversations, build.inputs["rendered"], tokenizer, template, stop_tokens, RowPolicy(**policy)
    )
    counts = total(build_shards(build.out, shards, work, runtime=build.runtime, desc="tokenize"))
    return {**counts, "source": _source(build), "sample": first_row(build.inputs["rendered"])}


def _source(build: Build) -> dict[str, Any]:
    """What became of the source's rows before, from the manifests of these steps: those of an older build of the same
    bytes may be gone when a card is drawn."""
    conversations = build.manifests["conversations"]
    downloaded, rendered = conversations["counts"], build.manifests["rendered"]["counts"]
    return {
        "pin": conversations["identity"]["section"]["pin"],
        **{name: downloaded[name] for name in ("rows", "conversations")},
        **{name: rendered[name] for name in ("conversations_split", "control_tokens_kept_as_text")},
        "rejected": {"download": downloaded["rejected"], "render": rendered["rejected"]},
    }


def _start(
    conversations: Path,
    rendered: Path,
    tokenizer: dict[str, Any],
    template: dict[str, Any],
    stop_tokens: list[str],
    policy: RowPolicy,
) -> Any:
    vocabulary = load_tokenizer(**tokenizer)
    proof = MaskProof(
        vocabulary, chat_template(vocabulary, **template), all_stop_tokens(vocabulary, stop_tokens), policy
    )
    return functools.partial(_tokenize_shard, conversations, rendered, PieceEncoder(vocabulary), proof)


def _tokenize_shard(
    conversations: Path, rendered: Path, encoder: PieceEncoder, proof: MaskProof, shard: Shard, out: Path
) -> dict[str, Any]:
    counts = dict.fromkeys(("rows", "tokens", "trained_tokens", "duplicated_tokens"), 0)
    proved, lengths = [], []
    with (
        pq.ParquetFile(conversations) as said,
        pq.ParquetFile(shard_folder(rendered, shard) / "rendered.parquet") as source,
        pq.ParquetWriter(out / "index.parquet", INDEX, compression="zstd") as index,
        pa.OSFile(str(out / "tokens.arrow"), "wb") as file,
        pa.ipc.new_file(file, TOKENS) as tokens,
    ):
        for number, group in enumerate(range(shard.first_group, shard.end_group)):
            rows = source.read_row_group(number, use_threads=False)
            if rows.num_rows == 0:
                continue
            columns = rows.to_pydict()
            encoded = encode_rows(encoder, columns)
            talks = said.read_row_group(group, columns=["conversation"], use_threads=False)["conversation"].to_pylist()
            proved.append(proof.check([json.loads(talk) for talk in talks], columns, encoded))
            tokens.write_batch(encoded.as_batch(rows["weights"].combine_chunks()))
            table = _as_index(rows, encoded)
            index.write_table(table)
            counts["rows"] += rows.num_rows
            counts["tokens"] += len(encoded.ids)
            counts["trained_tokens"] += int(encoded.trained.sum())
            counts["duplicated_tokens"] += _duplicated(rows["conversation"].to_numpy(), table)
            lengths.append({"rows_by_tokens": by_length(encoded.lengths)})
            lengths.append({"rows_by_trained_tokens": by_length(encoded.num_trained)})
    return {**counts, **total(lengths), "proof": total(proved)}


def _as_index(rows: pa.Table, encoded: EncodedRows) -> pa.Table:
    kept = rows.select(["row_id", "prompt_hash", "answer"])
    counted = kept.append_column("num_tokens", pa.array(encoded.lengths))
    return counted.append_column("num_trained", pa.array(encoded.num_trained)).cast(INDEX)


def _duplicated(conversation: np.ndarray, index: pa.Table) -> int:
    """Context that stands in more than one row: the untrained tokens of all rows of a conversation but its longest."""
    untrained = index["num_tokens"].to_numpy() - index["num_trained"].to_numpy()
    longest = np.zeros(int(conversation.max()) + 1, dtype=np.int64)
    np.maximum.at(longest, conversation, untrained)
    return int(untrained.sum() - longest.sum())
