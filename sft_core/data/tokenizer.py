"""The recipe's tokenizer, and the encoding of pieces in which control tokens typed by a person stay text.

Invariant: a control token's id comes from the template alone, never from what a message says.
"""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Literals = list[tuple[int, int]]  # character ranges of a piece that look like control tokens and are text


def load_tokenizer(
    *, path: str, revision: str | None, add_special_tokens: list[str], eos_token: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerFast:
    """The fast tokenizer with the recipe's tokens added. Raises ValueError for one that cannot be used."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: has no fast tokenizer (tokenizer.json); convert it with transformers first")
    new = [token for token in add_special_tokens if token not in tokenizer.get_added_vocab()]
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"model.eos_token: found {eos_token!r}; it is not a token of {path}")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token is None:
        raise ValueError(f"{path}: has no end token; set model.eos_token to the one that ends an assistant turn")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[return-value]


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The added tokens that a template writes; runs of white space, which some vocabularies add, are text."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: index for index, token in added if token.content.strip()}


def control_pattern(tokens: dict[str, int]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


class PieceEncoder:
    """Token ids of text pieces, each encoded by itself as a served prompt and a generated answer are.

    Raises ValueError for a tokenizer that puts a space in front of each piece: its pieces do not add up.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        from tokenizers import Tokenizer

        self._control = control_tokens(tokenizer)
        self._pattern = control_pattern(self._control)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(truncation=None, padding=None)
        self._encoder = Tokenizer.from_str(json.dumps(state))
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in self._control]
        self._state_without_control = state
        if len(self._encoder.decode(self._encoder.encode("a", add_special_tokens=False).ids)) != 1 or (
            self._encoder.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
        ):
            raise ValueError(
                f"{tokenizer.name_or_path}: puts a space in front of every piece of text (add_prefix_space or a "
                "SentencePiece prefix), so what is trained would differ from what is served; use a tokenizer without it"
            )

    @functools.cached_property
    def _text_only(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(self._state_without_control))

    @functools.cached_property
    def _true_ids(self) -> dict[int, int]:
        # Without the control tokens, those added after them move up, onto the control tokens' own ids.
        added = self._state_without_control["added_tokens"]
        return {self._text_only.token_to_id(token["content"]): token["id"] for token in added}

    def _encode_text(self, text: str) -> list[int]:
        ids = self._text_only.encode(text, add_special_tokens=False).ids
        return [self._true_ids.get(token, token) for token in ids]

    def encode(self, pieces: list[str], literals: list[Literals]) -> list[list[int]]:
        """Ids of each piece; the ranges in `literals` are encoded as text even where they look like control tokens."""
        encodings = self._encoder.encode_batch_fast(pieces, add_special_tokens=False)
        return [
            self._with_literals(piece, ranges) if ranges else encoding.ids
            for piece, ranges, encoding in zip(pieces, literals, encodings, strict=True)
        ]

    def _with_literals(self, piece: str, literals: Literals) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._pattern.finditer(piece):
            if any(match.start() < end and begin < match.end() for begin, end in literals):
                continue
            ids += self._encode_text(piece[start : match.start()])
            ids.append(self._control[match[0]])
            start = match.end()
        return ids + self._encode_text(piece[start:])
