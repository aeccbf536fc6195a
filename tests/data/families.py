"""The families of chat templates that the tests cover, each with a vocabulary of its own control tokens."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sft_core.data.proof.mask import MaskProof
from sft_core.data.rendering.build import chat_template, make_renderer
from sft_core.data.rendering.policy import RowPolicy
from sft_core.data.rendering.spans import RenderedRow, Renderer
from sft_core.data.rendering.templates import TemplateError
from sft_core.data.sources.rejects import Rejected
from sft_core.data.tokenizer.encoded import EncodedRows, encode_rows
from sft_core.data.tokenizer.tokenizer import PieceEncoder
from sft_core.data.tokenizer.tokenizer import stop_tokens as all_stop_tokens
from tests.data.rows import columns

TEMPLATES = Path(__file__).parent / "templates"
OWN = Path(__file__).parents[2] / "configs" / "templates"
# Words with a space, newlines on their own, punctuation with the newlines after it: as the vocabularies of today split.
_WORDS = r"\s*[\r\n]+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
_SENTENCES = [
    "assistant\n\nHello there.\n\n",
    "user\n\n\nThe answer is\n",
    " functions to assistant",
    "model\n|>\n[{\n",
]


@functools.cache
def _words() -> str:
    """A byte-level BPE without control tokens whose merges cross what templates write, as its tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES * 20, trainer)
    assert {"ĊĊ", ".ĊĊ", "|>Ċ"} <= set(tokenizer.get_vocab()), "no merge crosses a newline"
    return tokenizer.to_str()


def vocabulary(control: Iterable[str], *, eos: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with these control tokens; as in Qwen's, what looks like a tag is added without being special."""
    tokenizer = Tokenizer.from_str(_words())
    for token in dict.fromkeys([*control, eos, *([bos] if bos else []), "<|pad|>"]):
        is_tag = token.strip("</>").isidentifier() and token != eos
        add = tokenizer.add_tokens if is_tag else tokenizer.add_special_tokens
        add([AddedToken(token, normalized=False, special=not is_tag)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, name_or_path="families", eos_token=eos, bos_token=bos, pad_token="<|pad|>"
    )


@dataclasses.dataclass(frozen=True)
class Chat:
    """A template with its vocabulary, and all that is made of a conversation by them."""

    vocabulary: PreTrainedTokenizerFast
    source: str
    extra_stop_tokens: tuple[str, ...] = ()
    policy: RowPolicy = RowPolicy()  # noqa: RUF009  (frozen)

    @functools.cached_property
    def renderer(self) -> Renderer:
        # transformers' strftime_now cannot be frozen, and its prompts are compared with ours.
        made = chat_template(self.vocabulary, source=self.source, kwargs={}, date=datetime.date.today().isoformat())
        return make_renderer(self.vocabulary, made, self.policy, list(self.extra_stop_tokens))

    @functools.cached_property
    def encoder(self) -> PieceEncoder:
        return PieceEncoder(self.vocabulary)

    def with_policy(self, **policy: str) -> Chat:
        return dataclasses.replace(self, policy=RowPolicy(**policy))

    def rows(self, conversation: dict[str, Any]) -> list[RenderedRow]:
        return self.renderer.render(conversation)

    def outcome(self, conversation: dict[str, Any]) -> list[list[str]] | str:
        """The trained texts of each row, or why there are none."""
        try:
            rows = self.rows(conversation)
        except Rejected as fault:
            return fault.reason
        except TemplateError as error:
            return f"template_error: {error}"
        return [spoken(row) for row in rows]

    def proved(self, conversation: dict[str, Any], rows: list[RenderedRow]) -> EncodedRows:
        """The rows as tokens, after the mask proof."""
        table = {**columns(*rows), "conversation": [0] * len(rows)}
        encoded = encode_rows(self.encoder, table)
        stops = all_stop_tokens(self.vocabulary, list(self.extra_stop_tokens))
        MaskProof(self.vocabulary, self.renderer.template, stops, self.policy).check([conversation], table, encoded)
        return encoded

    def served_prompt(self, conversation: dict[str, Any], index: int, *, tokenize: bool = True) -> Any:
        """The prompt of messages[index] as transformers makes it, tokenized whole: what a server's model sees."""
        return self.vocabulary.apply_chat_template(
            conversation["messages"][:index],
            tools=conversation.get("tools"),
            chat_template=self.source,
            add_generation_prompt=True,
            tokenize=tokenize,
            return_dict=False,
            **conversation.get("kwargs", {}),
        )


def spoken(row: RenderedRow) -> list[str]:
    return [row.text[start:end] for start, end in row.spans]


def unspoken(row: RenderedRow) -> str:
    """The text outside of the spans, which must be in order and apart."""
    borders = [0, *(offset for span in row.spans for offset in span), len(row.text)]
    assert borders == sorted(borders)
    return "|".join(row.text[start:end] for start, end in zip(borders[::2], borders[1::2], strict=True))


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
MISTRAL = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
DEEPSEEK_CALLS = (f"<｜tool▁{what}▁{where}｜>" for what in ("calls", "call") for where in ("begin", "end"))
DEEPSEEK_RESULTS = (f"<｜tool▁{what}▁{where}｜>" for what in ("outputs", "output") for where in ("begin", "end"))
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>", *DEEPSEEK_CALLS, *DEEPSEEK_RESULTS)
GEMMA = ("<start_of_turn>", "<end_of_turn>")
_VOCABULARIES: dict[str, dict[str, Any]] = {
    "chatml": {"control": CHATML, "eos": "<|im_end|>"},
    "chatml_marked": {"control": CHATML, "eos": "<|im_end|>"},
    "llama3": {"control": LLAMA3, "eos": "<|eot_id|>", "bos": "<|begin_of_text|>", "stops": ("<|eom_id|>",)},
    "qwen2_5": {"control": (*CHATML, *TAGS[2:4]), "eos": "<|im_end|>"},
    "qwen3": {"control": (*CHATML, *TAGS), "eos": "<|im_end|>"},
    "thinking": {"control": (*CHATML, *TAGS), "eos": "<|im_end|>"},
    "gemma": {"control": GEMMA, "eos": "<end_of_turn>", "bos": "<bos>"},
    "gemma2": {"control": GEMMA, "eos": "<end_of_turn>", "bos": "<bos>"},
    "mistral": {"control": (*MISTRAL, "[TOOL_CALLS]"), "eos": "</s>", "bos": "<s>"},
    "deepseek_r1": {
        "control": (*DEEPSEEK, "<think>", "</think>"),
        "eos": "<｜end▁of▁sentence｜>",
        "bos": "<｜begin▁of▁sentence｜>",
    },
    "smollm3": {"control": (*CHATML, "<think>", "</think>"), "eos": "<|im_end|>"},
    "gpt_oss": {"control": HARMONY, "eos": "<|return|>", "stops": ("<|call|>",)},
    "olmo2": {"control": (), "eos": "<|endoftext|>", "bos": "<|endoftext|>"},
    "olmo3": {"control": (*CHATML, "<functions>", "</functions>"), "eos": "<|endoftext|>"},
}
FAMILIES = tuple(_VOCABULARIES)


@functools.cache
def family(name: str) -> Chat:
    settings = dict(_VOCABULARIES[name])
    stops = settings.pop("stops", ())
    file = (OWN if name == "thinking" else TEMPLATES) / f"{name}.jinja"
    return Chat(vocabulary(settings.pop("control"), **settings), file.read_text(), stops)


def control_of(name: str) -> tuple[str, ...]:
    """The control tokens that the family's template writes or that end its turns."""
    settings = _VOCABULARIES[name]
    return tuple(dict.fromkeys([*settings["control"], settings["eos"]]))


# Conversations


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, thinking: str | None = None, **more: Any) -> dict[str, Any]:
    """As canonical conversations have it: no key without a value."""
    return {"role": "assistant", "content": text} | ({"reasoning_content": thinking} if thinking else {}) | more


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def call(number: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": "add", "arguments": arguments}}


def result(text: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "content": text, "name": "add", "tool_call_id": f"call0000{number}"}


def tool(description: str = "Adds.") -> dict[str, Any]:
    properties = {"a": {"type": "integer"}, "b": {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": ["a"]}
    return {"type": "function", "function": {"name": "add", "description": description, "parameters": parameters}}


def talk(*messages: dict[str, Any], tools: list[dict[str, Any]] | None = None, **kwargs: Any) -> dict[str, Any]:
    return {"messages": list(messages)} | ({"tools": tools} if tools else {}) | ({"kwargs": kwargs} if kwargs else {})
