"""Chat: what is streamed is what is generated, prompts are the template's, a turn without room is left out."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sft_core.evaluate.chat import Chat, Checkpoint, Sampling, TextStream, TooLong
from tests.evaluate.chained import NO_THINK, SMILE, THINK, chained, load_tokenizer

GREEDY = Sampling(64, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chained(tmp_path_factory.mktemp("chained"), {THINK: SMILE, NO_THINK: "no"})


def load(folder: Path, **kwargs: Any) -> Checkpoint:
    return Checkpoint.load(str(folder), revision=None, kwargs={"header": False, **kwargs}, trust_remote_code=False)


def ask(chat: Chat, text: str) -> list[str]:
    pieces: list[str] = []
    answer = chat.ask(text, pieces.append)
    assert "".join(pieces) == answer.text
    return pieces


def streamed(ids: list[int], stop_ids: list[int]) -> tuple[list[str], TextStream]:
    pieces: list[str] = []
    stream = TextStream(load_tokenizer(None), stop_ids, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces, stream


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 287), max_size=30))
def test_stream_of_any_tokens_adds_up_to_their_decoded_text(ids: list[int]):
    pieces, stream = streamed(ids, [290])
    assert "".join(pieces) == load_tokenizer(None).decode(ids) == stream.text


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=20))
def test_stream_of_text_tells_whole_characters_only(text: str):
    ids = load_tokenizer(None)(text, add_special_tokens=False)["input_ids"]
    pieces, _ = streamed([*ids, 290], [290])
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_stream_leaves_the_stop_token_out():
    pieces, stream = streamed([*load_tokenizer(None)("ab")["input_ids"], 290], [290])
    assert pieces == ["a", "b"] and stream.has_stopped


def test_answer_with_an_emoji_comes_in_whole_characters(folder: Path):
    assert ask(Chat(load(folder), GREEDY), "hello") == list(SMILE)


def test_answer_is_that_of_generate_on_the_same_ids(tmp_path: Path):
    """A model with random weights, whose answers hang on everything before them."""
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": 291, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=512, initializer_range=1.0)
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, None
    made = LlamaForCausalLM(config)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chat = Chat(load(tmp_path), Sampling(24, temperature=0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = []
    for turn in ("one", "two", "three"):
        prompt = tokenizer(chat.prompt(turn), return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=288)[0]
        wanted = [token for token in ids[prompt["input_ids"].shape[1] :].tolist() if token != tokenizer.eos_token_id]
        texts.append("".join(ask(chat, turn)))
        assert texts[-1] == tokenizer.decode(wanted)
    assert len(set(texts)) == 3 and all(texts)


def test_ctrl_c_in_a_finalizer_stops_the_answer_too(tmp_path: Path):
    """There Python prints an exception and goes on."""

    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))  # the handler runs between instructions: in here

    before = signal.getsignal(signal.SIGINT)
    chat = Chat(load(chained(tmp_path, {THINK: "abc", NO_THINK: "no"}, endless=True)), Sampling(100, temperature=0))
    heard: list[str] = []

    def hear(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            Dying()

    answer = chat.ask("hello", hear)
    assert answer.ended == "interrupted" and answer.num_tokens < 10
    assert signal.getsignal(signal.SIGINT) is before


def test_prompt_is_that_of_the_template_and_kwargs(folder: Path):
    checkpoint = load(folder)
    chat = Chat(checkpoint, GREEDY, system="Be kind.")
    ask(chat, "hello")
    expected = checkpoint.tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": SMILE},
            {"role": "user", "content": "more"},
        ],
        add_generation_prompt=True,
        tokenize=False,
        header=False,
    )
    assert chat.prompt("more") == expected


def test_no_think_changes_the_prompt_and_the_answer_and_think_changes_them_back(folder: Path):
    chat = Chat(load(folder), GREEDY)
    plain = chat.prompt("a")
    chat.think(False)
    assert chat.prompt("a") == plain + "<think>\n\n</think>\n\n"
    assert "".join(ask(chat, "a")) == "no"
    chat.think(True)
    chat.turns.clear()
    assert chat.prompt("a") == plain
    assert "".join(ask(chat, "a")) == SMILE


def test_no_think_wins_over_a_flag_in_the_system_message(folder: Path):
    chat = Chat(load(folder), GREEDY, system="Be kind. /think")
    assert not chat.prompt("a").endswith("</think>\n\n")
    chat.think(False)
    assert chat.prompt("a").endswith("</think>\n\n")
    assert chat.system == "Be kind. /think"


def test_think_without_a_switch_in_the_template_is_an_error(folder: Path):
    checkpoint = load(folder)
    checkpoint.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{{ 'assistant\\n' }}"
    )
    plain = Checkpoint(checkpoint.model, checkpoint.tokenizer, {})
    with pytest.raises(ValueError, match="has no switch for thinking"):
        Chat(plain, GREEDY, thinking=False)
    chat = Chat(plain, GREEDY)
    assert "".join(ask(chat, "a")) == SMILE
    # A template that knows no thoughts is given the answer as it was written.
    assert plain.said("assistant\n", "<think>\nso\n</think>\n\nyes") == {
        "role": "assistant",
        "content": "<think>\nso\n</think>\n\nyes",
    }


@pytest.mark.parametrize(
    ("prompt", "text"), [("x\n", "<think>\nso\n</think>\n\nyes"), ("x\n<think>\n", "so\n</think>\n\nyes")]
)
def test_thoughts_of_an_answer_are_left_to_the_template(folder: Path, prompt: str, text: str):
    turn = load(folder).said(prompt, text)
    assert turn == {"role": "assistant", "content": "yes", "reasoning_content": "so"}


def test_thoughts_that_never_end_stay_in_the_answer(folder: Path):
    assert load(folder).said("x\n", "<think>\nso")["content"] == "<think>\nso"


def test_stop_tokens_are_those_of_the_generation_config(tmp_path: Path):
    chat = Chat(load(chained(tmp_path, {THINK: "ab~cd"})), GREEDY)
    pieces: list[str] = []
    answer = chat.ask("x", pieces.append)
    assert (answer.text, answer.ended, answer.num_tokens) == ("ab", "stop", 3)


def test_too_long_is_told_and_the_conversation_stays(tmp_path: Path):
    chat = Chat(load(chained(tmp_path, {THINK: "ok"}, context=64)), GREEDY)
    ask(chat, "hi")
    turns = list(chat.turns)
    assert len(turns) == 2
    with pytest.raises(TooLong, match=r"has \d\d\d tokens with this turn, and the model's context is 64"):
        chat.ask("x" * 100, lambda text: None)
    assert chat.turns == turns
    assert "".join(ask(chat, "hi")) == "ok"


def test_answer_ends_where_the_context_does(tmp_path: Path):
    chat = Chat(load(chained(tmp_path, {THINK: "abc"}, endless=True, context=64)), Sampling(1000, temperature=0))
    num_prompt = len(load_tokenizer()(chat.prompt("hi"))["input_ids"])
    answer = chat.ask("hi", lambda text: None)
    assert (answer.num_tokens, answer.ended) == (64 - num_prompt, "length")


def test_interrupt_keeps_what_was_said(tmp_path: Path):
    chat = Chat(load(chained(tmp_path, {THINK: "abc"}, endless=True)), GREEDY)

    def interrupt(text: str) -> None:
        told.append(text)
        if len(told) == 4:
            raise KeyboardInterrupt

    told: list[str] = []
    answer = chat.ask("hi", interrupt)
    assert answer.ended == "interrupted" and answer.text == "abca"
    assert chat.turns[-1] == {"role": "assistant", "content": "abca"}


def test_interrupt_before_the_first_token_leaves_the_turn_out(folder: Path):
    def interrupt(module: Any, arguments: Any) -> None:
        raise KeyboardInterrupt

    checkpoint = load(folder)
    chat = Chat(checkpoint, GREEDY)
    hook = checkpoint.model.register_forward_pre_hook(interrupt)
    assert chat.ask("hi", lambda text: None).ended == "interrupted"
    hook.remove()
    assert chat.turns == []
    assert "".join(ask(chat, "hi")) == SMILE


def test_sampling_is_seeded_and_follows_its_settings(folder: Path):
    def sampled(**options: Any) -> str:
        return Chat(load(folder), Sampling(40, **options)).ask("x", lambda text: None).text

    hot = {"temperature": 50.0}
    assert sampled(**hot, seed=1) == sampled(**hot, seed=1) != sampled(**hot, seed=2)
    assert sampled(**hot, top_p=1e-6, seed=1) == sampled(temperature=0) == SMILE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature: found -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p: found 0"),
        ({"top_p": 0.5}, "--top-p: answers are greedy"),
        ({"temperature": 0.0, "top_p": 0.5}, "--top-p: answers are greedy"),
    ],
)
def test_sampling_that_cannot_be_is_refused(folder: Path, options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        Chat(load(folder), Sampling(8, **options))


def test_checkpoint_without_a_template_is_refused(folder: Path):
    checkpoint = load(folder)
    checkpoint.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Checkpoint(checkpoint.model, checkpoint.tokenizer, {})
