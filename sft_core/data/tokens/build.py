"""The tokenize stage: rendered rows as token shards, each row proved against its conversation.

Invariant: a mask changes only where a piece ends, and pieces are encoded one by one, so no token crosses the border of
a trained span.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.data.proof.mask import MaskProof
from sft_core.data.rendering.build import RenderedCounts, Rendering, TemplateArguments
from sft_core.data.shards.parallel import Shard, Tally, Work, build_shards, plan_shards, shard_folder, total
from sft_core.data.shards.token_shards import INDEX, TOKENS
from sft_core.data.sources.conversation_counts import ConversationCounts
from sft_core.data.tokenizer.encoded import EncodedRows, encode_rows
from sft_core.data.tokenizer.tokenizer import PieceEncoder, TokenizerArguments
from sft_core.data.tokens.lengths import by_length
from sft_core.data.tokens.sample import first_row
from sft_core.data.tokens.token_counts import EarlierCounts, ProofCounts, TokenCounts
from sft_core.parquet import open_parquet

if TYPE_CHECKING:
    from sft_core.store.stage import Build


def build_tokens(
    build: Build,
    *,
    tokenizer: TokenizerArguments,
    template: TemplateArguments,
    stop_tokens: list[str],
    policy: dict[str, str],
) -> dict[str, Any]:
    """Writes shards of tokens.arrow and index.parquet: one row for each rendered row, in the same order.

    The counts include those of the stages before, and a row to look at. Raises MaskProofFailed, with the row, when a
    row does not train exactly what its conversation says.
    """
    conversations = build.inputs["conversations"] / "conversations.parquet"
    with open_parquet(conversations) as file:
        shards = plan_shards(file.num_row_groups)
    rendering = functools.partial(Rendering.load, tokenizer, template, stop_tokens, policy)
    work = functools.partial(_prepare_work, conversations, build.inputs["rendered"], rendering)
    counts = total(build_shards(build.out, shards, work, runtime=build.runtime, desc="tokenize"))
    proof = ProofCounts.from_json(counts.pop("proof"))
    return TokenCounts(
        **counts, proof=proof, source=_earlier_counts(build), sample=first_row(build.inputs["rendered"])
    ).to_json()


def _earlier_counts(build: Build) -> EarlierCounts:
    """The counts of download and render. They are copied, because their manifests may be gone when a card is drawn."""
    conversations = build.manifests["conversations"]
    downloaded = ConversationCounts.from_json(conversations["counts"])
    rendered = RenderedCounts.from_json(build.manifests["rendered"]["counts"])
    return EarlierCounts(
        pin=conversations["identity"]["section"]["pin"],
        rows=downloaded.rows,
        conversations=downloaded.conversations,
        conversations_split=rendered.conversations_split,
        control_tokens_kept_as_text=rendered.control_tokens_kept_as_text,
        rejected={"download": downloaded.rejected, "render": rendered.rejected},
    )


def _prepare_work(conversations: Path, rendered: Path, rendering: Callable[[], Rendering]) -> Work:
    loaded = rendering()
    proof = MaskProof(loaded.vocabulary, loaded.template, loaded.stop_tokens, loaded.policy)
    return functools.partial(_tokenize_shard, conversations, rendered, PieceEncoder(loaded.vocabulary), proof)


def _tokenize_shard(
    conversations: Path, rendered: Path, encoder: PieceEncoder, proof: MaskProof, shard: Shard, out: Path
) -> Tally:
    counts = dict.fromkeys(("rows", "tokens", "trained_tokens", "duplicated_tokens"), 0)
    proved: list[Tally] = []
    lengths: list[Tally] = []
    with (
        open_parquet(conversations) as said,
        open_parquet(shard_folder(rendered, shard) / "rendered.parquet") as source,
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
    """Context tokens that stand in several rows: the untrained tokens of a conversation's rows but the longest."""
    untrained = index["num_tokens"].to_numpy() - index["num_trained"].to_numpy()
    longest = np.zeros(int(conversation.max()) + 1, dtype=np.int64)
    np.maximum.at(longest, conversation, untrained)
    return int(untrained.sum() - longest.sum())
