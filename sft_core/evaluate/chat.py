"""A conversation with a checkpoint: prompts by its own chat template, answers streamed as they are generated.

Invariant: the texts that are streamed, one after another, are the decoded answer; an answer at temperature 0 is what
`model.generate` gives for the same ids.
"""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from sft_core.data.rendering.served_turns import PROBE
from sft_core.data.rendering.thinking import OPEN_AT_END, THINKING_KEY

if TYPE_CHECKING:
    from pydantic import JsonValue

SWITCHES = ("enable_thinking", "thinking")  # template variables that switch thinking on and off
_FLAG = re.compile(r"(?<!\S)/(?:no_)?think(?!\S)")  # in a system message; in some templates it wins over the variable
_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*(.*)\Z", re.DOTALL)
_INCOMPLETE = "\ufffd"  # bytes that are no whole character yet decode to it
Message = dict[str, str]


class TooLong(ValueError):
    """The conversation has no room in the model's context."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn. None: as in the checkpoint's generation config. temperature 0: greedy."""

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    ended: Literal["stop", "length", "interrupted"]


class TextStream(BaseStreamer):
    """Streams tokens as text, as soon as they are whole characters.

    A character may take several tokens, so held-back tokens are decoded together with the tokens before them.
    """

    def __init__(self, tokenizer: Any, stop_ids: list[int], on_text: Callable[[str], None]):
        self.ids: list[int] = []
        self._tokenizer, self._stop_ids, self._on_text = tokenizer, stop_ids, on_text
        self._is_prompt = True
        self._start = self._end = 0  # the text of ids before _end is streamed; those from _start on are decoded again

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:  # generate passes the prompt first
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self.ids.append(token)
            if token not in self._stop_ids:
                self._stream_text(at_end=False)

    def end(self) -> None:
        self._stream_text(at_end=True)

    @property
    def has_stopped(self) -> bool:
        return bool(self.ids) and self.ids[-1] in self._stop_ids

    @property
    def text(self) -> str:
        return self._decoded(0, None)

    def _stream_text(self, *, at_end: bool) -> None:
        streamed, text = self._decoded(self._start, self._end), self._decoded(self._start, None)
        if len(text) > len(streamed) and (at_end or not text.endswith(_INCOMPLETE)):
            self._on_text(text[len(streamed) :])
            self._start, self._end = self._end, len(self.ids)

    def _decoded(self, start: int, end: int | None) -> str:
        ids = [token for token in self.ids[start:end] if token not in self._stop_ids]
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Checkpoint:
    """A model and its chat template. kwargs: the template's variables, as in training."""

    def __init__(self, model: Any, tokenizer: Any, kwargs: Mapping[str, JsonValue]):
        self.model, self.tokenizer, self.kwargs = model, tokenizer, kwargs
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.name_or_path}: has no chat template; name a checkpoint that was trained on conversations"
            )
        stops = model.generation_config.eos_token_id
        stops = tokenizer.eos_token_id if stops is None else stops
        self.stop_ids: list[int] = list(stops) if isinstance(stops, list) else [] if stops is None else [stops]
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.switch = next((name for name in SWITCHES if self._reads(name)), None)
        self._shows_thoughts = PROBE in self._text(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", THINKING_KEY: PROBE}],
            add_generation_prompt=False,
        )

    @classmethod
    def load(
        cls, path: str, *, revision: str | None, kwargs: Mapping[str, JsonValue], trust_remote_code: bool
    ) -> Checkpoint:
        """path: a folder or a hub id. Raises OSError or ValueError for a checkpoint that cannot be loaded."""
        if not sys.stderr.isatty():
            disable_progress_bar()
        places = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(path, **places)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True, **places)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, kwargs)

    def prompt(self, messages: list[Message], thinking: bool | None = None) -> str:
        """The text before the next answer. thinking: None leaves it to the template. Raises ValueError."""
        switched = {} if thinking is None or self.switch is None else {self.switch: thinking}
        try:
            return self._text(messages, **switched)
        except TemplateError as error:
            raise ValueError(f"the checkpoint's chat template refuses this conversation: {error}") from None

    def ids(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def said(self, prompt: str, text: str) -> Message:
        """An answer as an assistant turn. Its thoughts have a key of their own, so that the template can drop them."""
        is_open = OPEN_AT_END.search(prompt) is not None
        if self._shows_thoughts and (match := _THOUGHTS.match(f"<think>{text}" if is_open else text)):
            return {"role": "assistant", "content": match[2], THINKING_KEY: match[1].strip()}
        return {"role": "assistant", "content": text}

    def _reads(self, switch: str) -> bool:
        turns = [{"role": "user", "content": "a"}]
        return self._text(turns, **{switch: True}) != self._text(turns, **{switch: False})

    def _text(self, messages: list[Message], *, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        arguments = {**self.kwargs, **kwargs, "add_generation_prompt": add_generation_prompt}
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **arguments)


class Chat:
    """The turns so far, and the next answer. A turn that gets no answer is not kept."""

    def __init__(
        self, checkpoint: Checkpoint, sampling: Sampling, *, system: str | None = None, thinking: bool | None = None
    ):
        self.turns: list[Message] = []
        self.system = system
        self.thinking: bool | None = None
        self._checkpoint, self._sampling = checkpoint, sampling
        _set_sampling(checkpoint.model, sampling)
        torch.manual_seed(sampling.seed)
        if thinking is not None:
            self.think(thinking)

    def think(self, thinking: bool) -> None:
        """Switches thinking on or off. Raises ValueError for a template without a switch."""
        if self._checkpoint.switch is None:
            raise ValueError(f"this checkpoint's chat template has no switch for thinking ({' or '.join(SWITCHES)})")
        self.thinking = thinking

    def prompt(self, text: str) -> str:
        """The prompt for the user's next turn. Raises ValueError where the template refuses it."""
        system = self.system
        if system is not None and self.thinking is not None:
            system = _FLAG.sub("/think" if self.thinking else "/no_think", system)
        first = [{"role": "system", "content": system}] if system is not None else []
        return self._checkpoint.prompt([*first, *self.turns, {"role": "user", "content": text}], self.thinking)

    def ask(self, text: str, on_text: Callable[[str], None]) -> Answer:
        """Generates the answer and streams its text to `on_text`. Ctrl-C ends the answer; the text so far is kept.

        Raises TooLong, or ValueError where the template refuses the turn; both leave the conversation unchanged.
        """
        prompt = self.prompt(text)
        ids = self._checkpoint.ids(prompt)
        room = self._sampling.max_new_tokens
        if self._checkpoint.context is not None:
            room = min(room, self._checkpoint.context - len(ids))
        if room < 1:
            raise TooLong(
                f"the conversation has {len(ids)} tokens with this turn, and the model's context is "
                f"{self._checkpoint.context}; the turn is left out: say less, or /reset to start anew"
            )
        stream = TextStream(self._checkpoint.tokenizer, self._checkpoint.stop_ids, on_text)
        ended: Literal["stop", "length", "interrupted"] = "length"
        try:
            self._generate(ids, room, stream)
        except KeyboardInterrupt:
            stream.end()
            ended = "interrupted"
        if stream.has_stopped:
            ended = "stop"
        if stream.ids:
            self.turns += [{"role": "user", "content": text}, self._checkpoint.said(prompt, stream.text)]
        return Answer(stream.text, len(stream.ids), ended)

    def _generate(self, ids: list[int], max_new_tokens: int, stream: TextStream) -> None:
        """Raises KeyboardInterrupt when Ctrl-C was pressed."""
        model = self._checkpoint.model
        ids_BT = torch.tensor([ids], device=model.device)
        with torch.inference_mode(), CtrlC() as pressed:
            model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=max_new_tokens,
                eos_token_id=self._checkpoint.stop_ids or None,
                pad_token_id=self._checkpoint.tokenizer.pad_token_id,
                streamer=stream,
                stopping_criteria=StoppingCriteriaList([pressed]),
            )
        if pressed.is_set:
            raise KeyboardInterrupt


class CtrlC(StoppingCriteria):
    """Whether Ctrl-C was pressed, checked at each token. Python may drop an exception that comes inside a finalizer.

    A second Ctrl-C raises KeyboardInterrupt. Only the main thread gets signals; in others nothing changes.
    """

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> Self:
        self._is_main = threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGINT, self._press) if self._is_main else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._before)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.is_set, device=input_ids.device)  # type: ignore[return-value]

    def _press(self, *_: object) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


def _set_sampling(model: Any, sampling: Sampling) -> None:
    """Raises ValueError for a value out of range, and for one without effect."""
    settings = model.generation_config
    if sampling.temperature is not None:
        if sampling.temperature < 0:
            raise ValueError(f"--temperature: found {sampling.temperature:g}; it is at least 0, which is greedy")
        settings.do_sample = sampling.temperature > 0
        settings.temperature = sampling.temperature or None
    if sampling.top_p is not None:
        if not 0 < sampling.top_p <= 1:
            raise ValueError(f"--top-p: found {sampling.top_p:g}; it is over 0 and at most 1")
        if not settings.do_sample:
            raise ValueError("--top-p: answers are greedy, so it would do nothing; give a --temperature over 0 too")
        settings.top_p = sampling.top_p
    if not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = settings.min_p = settings.typical_p = None
