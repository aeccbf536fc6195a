"""Ids by pre-token: always the tokenizer's own, whatever the text; never a guess."""

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

from sft_core.data.pre_tokens import PreTokenEncoder

LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Words cut where small letters end, as gpt-oss's tokenizer cuts them.
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?|[^\r\n\p{L}\p{N}]?\p{Lu}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BY_ITSELF = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
CONTROL = ["<|im_start|>", "<|im_end|>", "<|im_"]


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior)


KINDS = {
    "gpt2": BY_ITSELF,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BY_ITSELF]),
    "llama3": pre_tokenizers.Sequence([split(LLAMA3), BYTES]),
    "qwen2": pre_tokenizers.Sequence([split(QWEN2), BYTES]),
    "cases": pre_tokenizers.Sequence([split(CASES), BYTES]),
    "in turn": pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split("[一-龥]+"), split(LLAMA3), BYTES]),
    "with gaps": pre_tokenizers.Sequence([split(r"\p{L}+"), BYTES]),
}


def make(pre_tokenizer: Any, normalizer: Any = None, control: list[Any] = CONTROL) -> Tokenizer:
    """A byte-level BPE with merges across white space, signs and scripts, so that each cut shows in the ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = BYTES
    texts = ["it's\n\n  12345 don'T  ", "äé  été 日本語  ٣٤\r\n", "fooBar  \n\t x", "ſ'ſ 👋🏽 <|im_"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts * 20, trainer)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(control)
    return tokenizer


def encoder_of(tokenizer: Tokenizer) -> PreTokenEncoder | None:
    return PreTokenEncoder.of(tokenizer, tokenizer.get_added_tokens_decoder())


def own_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def ids_of(encoder: PreTokenEncoder, text: str) -> list[int] | None:
    found = encoder.encode(text)
    return None if found is None else np.frombuffer(found, np.int32).tolist()


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, PreTokenEncoder]:
    tokenizer = make(KINDS[request.param], normalizers.NFC() if request.param == "qwen2" else None)
    encoder = encoder_of(tokenizer)
    assert encoder is not None
    return tokenizer, encoder


PARTS = [
    *"aZ'sſK1٣½ _-.,;/(\n\r\t\v\f\x1c\x85\u00a0\u200b日語äßéе\u0301👋🏽",
    "'ll",
    "'VE",
    "12",
    "  ",
    "\r\n",
    *CONTROL,
    "im_",
]


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(PARTS), max_size=30).map("".join), st.text(max_size=40)))
@example("12345  \n\n  x'll\r\n <|im_start|>user\n  ")
@example("e\u0301 \u0301e")
def test_any_text_ids_are_the_tokenizers_own(pair, text):
    tokenizer, encoder = pair
    assert ids_of(encoder, text) in (own_ids(tokenizer, text), None)


def test_text_of_an_old_unicode_is_never_left_to_the_tokenizer():
    tokenizer = make(KINDS["llama3"])
    encoder = encoder_of(tokenizer)
    for text in (
        "Plain words, 1234 of them.\n\n",
        "naïve — “quoted” 日本語 привет 👋🏽 \u200d\ufe0f",
        "<|im_end|>\n",
        "",
    ):
        assert ids_of(encoder, text) == own_ids(tokenizer, text)


@pytest.mark.parametrize("kind", ["llama3", "cases"])
def test_each_character_is_classed_as_the_tokenizer_does_or_left_to_it(kind):
    tokenizer = make(KINDS[kind])
    encoder = encoder_of(tokenizer)
    uniform = range(0x3400, 0xE000)  # Han and Hangul, which are letters all, and surrogates
    numbers = [number for number in range(0x1FC00) if number not in uniform and (number < 0x10000 or number >= 0x1F000)]
    left = []
    for character in map(chr, [*numbers, *range(0x3400, 0xD800, 97), *range(0x10000, 0x110000, 997)]):
        text = f"a{character}'{character}a 1{character}{character} {character}b"
        if encoder.encode(text) is None:
            left.append(character)
            continue
        cut = encoder._split(text, encoder._find_ascii if text.isascii() else encoder._find)
        assert cut == [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)], text
    in_use = [one for one in left if unicodedata.category(one) not in ("Cn", "Co") and ord(one) < 0x10000]
    assert len(in_use) < 40, "characters in common use are encoded here"


def test_each_pre_token_is_encoded_once_and_few_are_kept(monkeypatch):
    monkeypatch.setattr("sft_core.data.pre_tokens._MOST_KNOWN", len(CONTROL) + 2)
    tokenizer = make(KINDS["gpt2"])
    encoder = encoder_of(tokenizer)
    for text in ("a b c d", "a b<|im_end|>", "x" * 100, "e f g"):
        assert ids_of(encoder, text) == own_ids(tokenizer, text)
        assert len(encoder._ids) <= len(CONTROL) + 2
        assert not any(len(known) > 64 for known in encoder._ids)


@pytest.mark.parametrize(
    "settings_of",
    [
        lambda: make(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: make(BYTES),
        lambda: make(pre_tokenizers.Metaspace()),
        lambda: make(pre_tokenizers.Sequence([split(LLAMA3, "removed"), BYTES])),
        lambda: make(split(LLAMA3)),
        lambda: make(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTES])),
        lambda: make(pre_tokenizers.Sequence([split(r"\p{N}{1,3}+|\P{N}+"), BYTES])),
        lambda: make(pre_tokenizers.Sequence([split(r"[\w&&[^a]]+|."), BYTES])),
        lambda: make(pre_tokenizers.Sequence([split(r"(a)|[^a]+"), BYTES])),
        lambda: make(pre_tokenizers.Sequence([split(r"\h+|\H+"), BYTES])),
        lambda: make(KINDS["gpt2"], normalizers.NFKC()),
        lambda: make(KINDS["gpt2"], control=[AddedToken("<e>", rstrip=True)]),
        lambda: make(KINDS["gpt2"], control=[AddedToken("<e>", normalized=True), AddedToken("<f>", normalized=False)]),
    ],
)  # fmt: skip
def test_a_tokenizer_of_another_kind_is_left_alone(settings_of: Callable[[], Tokenizer]):
    assert encoder_of(settings_of()) is None


def test_dropout_is_left_alone():
    state = json.loads(make(KINDS["gpt2"]).to_str())
    state["model"]["dropout"] = 0.1
    assert encoder_of(Tokenizer.from_str(json.dumps(state))) is None
