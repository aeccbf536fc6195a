"""Ids by words seen before: whatever the text, they are those of the tokenizer that is asked for the whole."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sft_core.data.tokenizer import word_cache
from sft_core.data.tokenizer.tokenizer import PieceEncoder, pack
from sft_core.data.tokenizer.word_cache import WordCache, cuts_at_words
from sft_core.data.tokenizer.word_ends import first_word, last_word
from sft_core.data.tokenizer.word_table import WordTable, ends_of_words

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def splits(*patterns: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(one), "isolated") for one in patterns), BYTES])


KINDS = {
    "gpt_2": GPT_2,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2]),
    "llama_3": splits(word_cache.LLAMA_3),
    "qwen": splits(word_cache.QWEN),
    "gpt_oss": splits(word_cache.GPT_OSS),
    "mistral": splits(word_cache.MISTRAL),
    "deepseek": splits(*word_cache.BEFORE, word_cache.DEEPSEEK),
}
FRAGMENTS = [
    *(" ", "  ", "    ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x0b", "\x1c", "\x85", "\x00"),
    *(
        "a",
        "B",
        "the",
        "Word",
        "camelCase",
        "ſ",
        "é",
        "e\u0301",
        "\u0301",
        "ß",
        "ǅ",
        "İ",
        "Ω",
        "ж",
        "中",
        "か",
        "ー",
        "한",
    ),
    *("'", "'s", "'LL", "\u2019s", "7", "42", "123456", "²", "٣", "Ⅷ", ".", "...", "(", "_", "//", "$", "+", "\u00b4"),
    *("🙂", "👩\u200d💻", "\u200b", "\ufeff", "\u200d", "\u180e", "|", "<", "<|", "|>"),
]
TEXTS = st.one_of(st.lists(st.sampled_from(FRAGMENTS), max_size=24).map("".join), st.text(max_size=30))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """A vocabulary with merges, over all of its bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = KINDS[request.param], decoders.ByteLevel()
    rng = random.Random(0)
    texts = ["".join(rng.choices(FRAGMENTS, k=200)) for _ in range(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<|end|>", "<|end|>\n", "<|a b|>")])
    return made


def library(tokenizer: Tokenizer) -> Callable[[list[str]], list[bytes]]:
    def encode(texts: list[str]) -> list[bytes]:
        return [pack(found.ids) for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def split_words(text: str) -> list[str]:
    data = text.encode()
    ends = ends_of_words(np.frombuffer(data, np.uint8), np.array([len(data)]), np.array([False])).tolist()
    return [data[start:end].decode() for start, end in itertools.pairwise([0, *ends])]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
@example(text="boys' toys don't  do it'sx \t foo\n\n    bar(x), 12345 a\u0301b")
def test_words_are_cut_where_the_pre_tokenizer_cuts(tokenizer: Tokenizer, text: str):
    words = split_words(text)

    assert "".join(words) == text
    whole = [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert [part for word in words for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(word)] == whole
    assert (first_word(text), last_word(text)) == ((words[0], words[-1]) if words else ("", ""))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.one_of(TEXTS, TEXTS.map(lambda text: f"{text}<|end|>\n{text}<|a b|> {text}")), max_size=4))
def test_ids_of_any_texts_are_the_tokenizers(tokenizer: Tokenizer, texts: list[str]):
    added = tokenizer.get_added_tokens_decoder().values()
    assert cuts_at_words(tokenizer, added)
    encode = library(tokenizer)
    cache = WordCache(encode, [token.content for token in added])

    assert cache.encode(texts) == encode(texts)
    assert cache.encode(texts) == encode(texts), "from what it knows by then"


@pytest.mark.slow
def test_known_words_are_not_encoded_again(tokenizer: Tokenizer):
    asked = []

    def encode(texts: list[str]) -> list[bytes]:
        asked.extend(texts)
        return library(tokenizer)(texts)

    cache = WordCache(encode, [])
    cache.encode(["the word, the word", "the word"])
    cache.encode(["word, the"])

    assert sorted(asked) == [" the", " word", ",", "the", "word"]


def test_cache_that_is_full_gives_the_same_ids(tokenizer: Tokenizer, monkeypatch):
    monkeypatch.setattr(word_cache, "_MOST_KNOWN", 8)
    monkeypatch.setattr(word_cache, "_CHARACTERS_AT_ONCE", 40)
    rng = random.Random(1)
    texts = ["".join(rng.choices(FRAGMENTS, k=rng.randint(0, 60))) for _ in range(100)]
    cache = WordCache(library(tokenizer), [])

    assert cache.encode(texts) == library(tokenizer)(texts)
    assert len(cache._words) <= 8 + 40


@settings(max_examples=200, deadline=None)
@given(batches=st.lists(st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), max_size=40), max_size=5))
def test_words_are_numbered_once_in_the_order_in_which_they_come(batches: list[list[str]]):
    table, seen = WordTable(), {}
    for words in batches:
        data = [word.encode() for word in words]
        ends = np.cumsum([len(one) for one in data], dtype=np.int64)
        numbers = table.number(np.frombuffer(b"".join(data), np.uint8), ends)
        assert numbers.tolist() == [seen.setdefault(word, len(seen)) for word in words]
    assert table.words(0) == list(seen)
    assert table.words(len(seen) // 2) == list(seen)[len(seen) // 2 :]
    assert (len(table), table.num_bytes) == (len(seen), sum(len(word.encode()) for word in seen))


def test_table_of_many_words_keeps_them_all_apart():
    words = [f"{number:x}" for number in range(50_000)]
    data, ends = "".join(words).encode(), np.cumsum([len(word) for word in words])
    table = WordTable()
    for _ in range(2):
        assert table.number(np.frombuffer(data, np.uint8), ends).tolist() == list(range(50_000))
    assert table.words(49_998) == words[49_998:]


def spoiled(**parts: object) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = splits(word_cache.LLAMA_3)
    for name, part in parts.items():
        setattr(made, name, part)
    return made


@pytest.mark.parametrize(
    ("other", "added"),
    [
        (spoiled(normalizer=normalizers.NFKC()), []),
        (spoiled(normalizer=normalizers.NFC()), [AddedToken("<think>", normalized=True)]),
        (spoiled(model=models.BPE(dropout=0.1)), []),
        (spoiled(model=models.WordPiece(unk_token="[UNK]")), []),
        (spoiled(pre_tokenizer=None), []),
        (spoiled(pre_tokenizer=pre_tokenizers.Metaspace()), []),
        (spoiled(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), []),
        (spoiled(pre_tokenizer=splits(rf"\s+$|{word_cache.LLAMA_3}")), []),
        (spoiled(pre_tokenizer=splits(word_cache.LLAMA_3, word_cache.QWEN)), []),
        (
            spoiled(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "merged_with_previous"), GPT_2])),
            [],
        ),
        (spoiled(), [AddedToken("<think>", rstrip=True)]),
        (spoiled(), [AddedToken("yes", single_word=True)]),
        (spoiled(), [AddedToken("<a>", normalized=True), AddedToken("<a>b", normalized=False)]),
    ],
)
def test_tokenizers_that_may_see_more_than_a_word_are_asked_for_the_whole(other: Tokenizer, added: list[AddedToken]):
    assert cuts_at_words(spoiled(normalizer=normalizers.NFC()), [AddedToken("<think>", normalized=False)])
    assert not cuts_at_words(other, added)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.one_of(TEXTS, TEXTS.map(lambda text: f"{text}\ufdd1 {text}the\ufdd1")), max_size=5))
def test_pieces_of_any_text_have_the_tokenizers_ids(tokenizer: Tokenizer, texts: list[str]):
    encoder = PieceEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>"))
    expected = library(tokenizer)(texts)
    assert encoder.encode(texts, {}) == expected
    assert encoder.encode([*texts, *texts], {}) == expected * 2


def test_borders_are_found_as_the_library_finds_them(tokenizer: Tokenizer):
    encoder = PieceEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>"))
    assert encoder._text_only.cuts_at_words
    rng = random.Random(2)
    found = set()
    for _ in range(1000):
        before, after = ("".join(rng.choices(FRAGMENTS, k=rng.randint(1, 8))) for _ in range(2))
        alone, both = (tokenizer.encode(text, add_special_tokens=False).ids for text in (before, before + after))
        is_boundary = both[: len(alone)] == alone
        assert encoder.is_boundary(before, after) == is_boundary, (before, after)
        found.add(is_boundary)
    assert found == {True, False}
