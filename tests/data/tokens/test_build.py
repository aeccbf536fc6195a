"""Token shards: what is trained on is what is served, and a typed control token is never the real one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_core.data.shards.token_shards import TokenRow, TokenShards, read_index
from sft_core.data.sources.formats.conversations import canonical
from sft_core.data.tokenizer.encoded import encode_rows
from sft_core.data.tokenizer.tokenizer import PieceEncoder, control_tokens
from steps.render import RENDERED
from steps.tokenize import TOKENS
from tests.data.rows import columns

SMOLLM2 = Path(__file__).parents[3] / "data" / "smollm2-135m"
STOP = "<|im_end|>"


@pytest.fixture(scope="module", params=["quickstart", "byte_level", "smollm2"])
def tokenizer(request: pytest.FixtureRequest, load: Callable) -> PreTrainedTokenizerFast:
    if request.param != "smollm2":
        return request.getfixturevalue(request.param)
    if not (SMOLLM2 / "tokenizer.json").is_file():
        pytest.skip(f"{SMOLLM2} is not here; configs/smollm2/get_model.py makes it")
    return load(SMOLLM2)


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> PieceEncoder:
    return PieceEncoder(tokenizer)


def talk(*contents: str, thinking: str | None = None, **row: Any) -> dict[str, Any]:
    """User and assistant by turns; the last answer thinks."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    messages[-1]["reasoning_content"] = thinking
    return canonical({"messages": messages, **row})


def trained_runs(row: TokenRow) -> list[list[int]]:
    borders = np.flatnonzero(np.diff(row.trained.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [row.input_ids[start:end].tolist() for start, end in borders]


def plain_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


# Pieces


def test_rows_are_encoded_piece_by_piece(tokenizer, encoder, renderer):
    conversation = talk("Hello there", "\n\nThe answer is\n\n", "user\n\n", " Hi.")
    (row,) = renderer(tokenizer, served_prefix="text").render(conversation)
    (found,) = encode_rows(encoder, columns(row))
    (a, b), (c, d) = row.spans
    pieces = [row.text[:a], row.text[a:b], row.text[b:c], row.text[c:d], row.text[d:]]
    assert found.input_ids.tolist() == [token for piece in pieces for token in plain_ids(tokenizer, piece)]
    assert trained_runs(found) == [plain_ids(tokenizer, pieces[1]), plain_ids(tokenizer, pieces[3])]
    assert (found.input_ids.dtype, found.trained.dtype) == (np.int32, np.uint8)
    assert set(found.trained.tolist()) == {0, 1}


def test_text_encoded_whole_would_straddle_a_border(byte_level, renderer):
    (row,) = renderer(byte_level).render(talk("Hello", "\n\nThe answer"))
    (found,) = encode_rows(PieceEncoder(byte_level), columns(row))
    assert plain_ids(byte_level, row.text) != found.input_ids.tolist(), "the tests of pieces would prove nothing"


def test_several_rows_in_one_call_are_those_of_single_calls(tokenizer, encoder, renderer):
    one = renderer(tokenizer)
    rows = [one.render(talk(f"question {n} {STOP * n}", f"answer {n}"))[0] for n in range(3)]
    for row, found in zip(rows, encode_rows(encoder, columns(*rows)), strict=True):
        (alone,) = encode_rows(encoder, columns(row))
        assert found.input_ids.tolist() == alone.input_ids.tolist()
        assert found.trained.tolist() == alone.trained.tolist()


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=["think", "no_think"])
def test_served_prompt_of_each_turn_is_an_exact_prefix_of_its_row(
    tokenizer, encoder, renderer, kwargs: dict[str, bool]
):
    one = renderer(tokenizer)
    conversation = talk("Hello  there", "The answer is\n\n4.", "And now?", "\nHi.", chat_template_kwargs=kwargs)
    rows = one.render(conversation)

    def served(num_messages: int) -> list[int]:
        """By transformers, as a server does it: its own rendering, its own tokenizing of the whole prompt."""
        options = {"add_generation_prompt": True, "return_dict": False, "header": False, **kwargs}
        messages = conversation["messages"][:num_messages]
        return tokenizer.apply_chat_template(messages, chat_template=one.template.source, **options)

    said = ["The answer is\n\n4.", "\nHi."]
    for row, found in zip(rows, encode_rows(encoder, columns(*rows)), strict=True):
        starts = np.flatnonzero(np.diff(found.trained.astype(int), prepend=0) == 1)
        for turn, start, run in zip(row.turns, starts, trained_runs(found), strict=True):
            assert found.input_ids[:start].tolist() == served(turn)
            assert run == plain_ids(tokenizer, f"{said.pop(0)}{STOP}")
    assert said == []


def test_turns_share_a_row_where_a_later_prompt_has_the_same_tokens(byte_level, renderer):
    """In byte_level a newline and the `The` behind it become one token when history is tokenized as a whole."""
    plain, merging = (talk("Hello", answer, "And now?", "Hi.") for answer in ("4.", "\n\nThe answer"))
    assert [row.turns for row in renderer(byte_level).render(plain)] == [[1, 3]]
    assert [row.turns for row in renderer(byte_level).render(merging)] == [[1], [3]]
    assert [row.turns for row in renderer(byte_level, served_prefix="text").render(merging)] == [[1, 3]]


def test_loss_scope_all_and_raw_text_train_every_token(tokenizer, encoder, renderer):
    one = renderer(tokenizer, loss_scope="all")
    for conversation in (talk("Hello", "Hi."), {"text": f"Once {STOP}"}):
        (row,) = one.render(conversation)
        (found,) = encode_rows(encoder, columns(row))
        assert len(found.trained) == len(found.input_ids) > 5
        assert found.trained.all()


# Control tokens


def test_typed_control_tokens_never_give_their_ids(tokenizer, encoder, renderer):
    control = control_tokens(tokenizer)
    typed = " ".join(control) + "  x        y" + "".join(control)
    one = renderer(tokenizer)
    (plain,), (row,) = one.render(talk("Hello", "Hi.")), one.render(talk(typed, f"{typed}."))
    wanted, found = encode_rows(encoder, columns(plain, row))
    assert len(control) >= 3
    assert len(row.literals) == 4 * len(control)
    # As many as in the same conversation without them: those of the template.
    ids = list(control.values())
    assert np.isin(found.input_ids, ids).sum() == np.isin(wanted.input_ids, ids).sum() == 4
    assert tokenizer.decode(found.input_ids) == row.text
    (run,) = trained_runs(found)
    assert run.count(control[STOP]) == 1
    assert run[-1] == control[STOP]


def test_typed_control_token_leaves_the_text_around_it_as_it_is(byte_level, renderer):
    """The added runs of spaces stand after the control tokens: without those, their ids would move up."""
    runs = [byte_level.convert_tokens_to_ids(token) for token in ("  ", "        ")]
    assert min(runs) > max(control_tokens(byte_level).values())
    (row,) = renderer(byte_level).render(talk(f"a  b        c{STOP}", "Hi."))
    (found,) = encode_rows(PieceEncoder(byte_level), columns(row))
    text = plain_ids(byte_level, "user\na  b        c")
    assert [token for token in text if token in runs] == runs
    assert found.input_ids.tolist()[1 : 1 + len(text)] == text


def test_added_token_that_is_not_special_is_control_where_the_template_writes_it(byte_level, renderer):
    (row,) = renderer(byte_level).render(talk("Say <think>", "4", thinking="hm </think> hm"))
    (found,) = encode_rows(PieceEncoder(byte_level), columns(row))
    assert [row.text[start:end] for start, end in row.literals] == ["<think>", "</think>"]
    think, end = (byte_level.convert_tokens_to_ids(token) for token in ("<think>", "</think>"))
    (run,) = trained_runs(found)
    assert run[0] == think
    assert found.input_ids.tolist().count(think) == found.input_ids.tolist().count(end) == 1


def test_added_tokens_of_the_recipe_become_control_tokens(load, quickstart, renderer):
    more = load(quickstart.name_or_path, add_special_tokens=["<|call|>"])
    template = "{% for m in messages %}{{ m.role ~ '<|call|>' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant<|call|>{% endif %}"
    (row,) = renderer(more, template=template).render(talk("Say <|call|>", "4<|call|>"))
    (found,) = encode_rows(PieceEncoder(more), columns(row))
    assert more.convert_tokens_to_ids("<|call|>") == len(quickstart)
    assert found.input_ids.tolist().count(len(quickstart)) == len(row.literals) == 2
    assert more.decode(found.input_ids) == row.text


PARTS = ["a", "\n", "\n\n", "  ", "        ", "é👋", STOP, "<think>", "<|im_", "end|>"]
texts = st.lists(st.sampled_from(PARTS), max_size=8).map("".join)


@settings(max_examples=80, deadline=None)
@given(question=texts, answer=texts)
def test_any_text_its_ids_decode_to_it_and_control_ids_are_the_templates(question, answer, byte_level, renderer):
    (row,) = renderer(byte_level).render(talk(question, f"A{answer}"))
    (found,) = encode_rows(PieceEncoder(byte_level), columns(row))
    assert byte_level.decode(found.input_ids) == row.text
    (run,) = trained_runs(found)
    assert byte_level.decode(run) == f"A{answer}{STOP}"
    assert np.isin(found.input_ids, list(control_tokens(byte_level).values())).sum() == 4


# Tokenizers that cannot be used


def bpe(vocabulary: str, **parts: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters."""
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, []))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens([AddedToken("<e>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="some/tokenizer", eos_token="<e>")


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always"), "decoder": decoders.Metaspace()},
        {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first"), "decoder": decoders.Metaspace()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True), "decoder": decoders.ByteLevel()},
        {"normalizer": normalizers.Prepend("▁"), "decoder": decoders.Metaspace()},
    ],
    ids=["metaspace", "metaspace first", "byte level with prefix space", "prepend"],
)
def test_tokenizer_that_puts_a_space_in_front_is_refused(parts: dict[str, Any]):
    with pytest.raises(ValueError, match=r"some/tokenizer: puts a space in front of every piece .* without it"):
        PieceEncoder(bpe("aĠ▁", **parts))


def test_tokenizer_metaspace_without_prefix_is_accepted():
    metaspace = {"replacement": "▁", "prepend_scheme": "never"}
    parts = {"pre_tokenizer": pre_tokenizers.Metaspace(**metaspace), "decoder": decoders.Metaspace(**metaspace)}
    encoded = PieceEncoder(bpe("a▁", **parts)).encode(["a a", "a"], {})
    assert [np.frombuffer(ids, np.int32).tolist() for ids in encoded] == [[0, 1, 0], [0]]


def test_load_tokenizer_says_what_is_missing(load, quickstart, tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.eos_token: found '</s>'; it is not a token"):
        load(quickstart.name_or_path, eos_token="</s>")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (Path(quickstart.name_or_path) / name).read_text()
        (tmp_path / name).write_text(text.replace('"eos_token": "<|im_end|>",', ""))
    with pytest.raises(ValueError, match=r"has no end token; set model\.eos_token"):
        load(tmp_path)
    assert load(tmp_path, eos_token=STOP).eos_token == STOP


# Shards


@pytest.fixture
def build(write_rows: Callable, pinned: Callable, ensure: Callable) -> Callable[..., tuple[Path, Path, dict[str, Any]]]:
    """The folders of the rendered rows and of the shards of some conversations, and the counts."""

    def make(rows: list[dict[str, Any]], **sections: Any) -> tuple[Path, Path, dict[str, Any]]:
        recipe = pinned({"name": "s", "path": str(write_rows("a.jsonl", rows))}, **sections)
        folder, manifest = ensure(TOKENS, recipe, source="s")
        return ensure(RENDERED, recipe, source="s")[0], folder, manifest["counts"]

    return make


def raw_rows(num_rows: int) -> list[dict[str, Any]]:
    """Rows of several lengths; each seventh has a typed control token."""
    said = [(f"question {n} {'' if n % 7 else STOP}", "answer " * (n % 5 + 1)) for n in range(num_rows)]
    return [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "answer": str(number),
        }
        for number, (question, answer) in enumerate(said)
    ]


def test_shards_read_back_are_the_rows_and_the_index_matches(build, quickstart):
    rendered, folder, counts = build(raw_rows(30))
    table = pa.concat_tables(pq.read_table(path) for path in sorted(rendered.glob("*/rendered.parquet")))
    rows = table.to_pylist()
    shards, index = TokenShards(folder), read_index(folder).to_pylist()
    expected = encode_rows(PieceEncoder(quickstart), table.to_pydict())
    assert len(shards) == len(index) == len(rows) == counts["rows"] == 30
    for number, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
        found = shards[number]
        assert found.input_ids.tolist() == wanted.input_ids.tolist()
        assert found.trained.tolist() == wanted.trained.tolist()
        assert (found.input_ids.dtype, found.trained.dtype) == (np.int32, np.uint8)
        assert index[number] == {
            "row_id": row["row_id"],
            "prompt_hash": row["prompt_hash"],
            "answer": str(number),
            "num_tokens": len(wanted.input_ids),
            "num_trained": int(wanted.trained.sum()),
        }
    assert counts["tokens"] == sum(row["num_tokens"] for row in index)
    assert counts["trained_tokens"] == sum(row["num_trained"] for row in index) > 0
    for outside in (-1, 30):
        with pytest.raises(IndexError):
            shards[outside]


def test_shards_several_hold_the_rows_in_order_whatever_the_workers(build, quickstart):
    rendered, folder, counts = build(raw_rows(1200), runtime={"num_workers": 2})
    assert [path.name for path in sorted(folder.glob("shard-*"))] == [f"shard-{n:05}" for n in range(3)]
    shards = TokenShards(folder)
    texts = pa.concat_tables(pq.read_table(path) for path in sorted(rendered.glob("*/rendered.parquet")))["text"]
    assert len(shards) == counts["rows"] == 1200
    for number in (0, 499, 500, 999, 1000, 1199):
        assert quickstart.decode(shards[number].input_ids) == texts[number].as_py()
    lengths = [len(shards[number].input_ids) for number in range(1200)]
    assert lengths == read_index(folder)["num_tokens"].to_pylist()


def test_shards_are_mapped_and_not_copied(build):
    _, folder, _ = build(raw_rows(20))
    row = TokenShards(folder)[7]
    for values in (row.input_ids, row.trained):
        assert not values.flags.owndata
        assert not values.flags.writeable


def test_shards_take_at_most_6_bytes_a_token(build):
    rows = raw_rows(400)
    for row in rows:
        row["messages"][1]["content"] = "The answer of a realistic row has some sentences. " * 8
    _, folder, counts = build(rows)
    assert counts["tokens"] > 50_000
    num_bytes = sum(path.stat().st_size for path in folder.glob("shard-*/*"))
    assert num_bytes / counts["tokens"] < 6


def test_loss_scope_changes_the_mask_and_not_the_ids(write_rows, pinned, ensure):
    source = {"name": "s", "path": str(write_rows("a.jsonl", raw_rows(3)))}
    recipes = pinned(source), pinned(source, training={"loss_scope": "all"})
    answers, everything = (TokenShards(ensure(TOKENS, recipe, source="s")[0]) for recipe in recipes)
    for number in range(3):
        ids = everything[number].input_ids.tolist()
        assert answers[number].input_ids.tolist() == ids
        assert everything[number].trained.all()
        assert 0 < answers[number].trained.sum() < len(ids)
