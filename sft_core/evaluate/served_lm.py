"""A model behind lm-eval's interface. Prompts are as in serving, and answers come without their thinking.

Differences to lm-eval's own wrapper: a prompt is rendered with the recipe's date and kwargs, gets no second BOS, and
has the tokens that it has in serving; a stop string inside a thought ends nothing; log-softmax is in fp32; of the
checkpoint's generation settings only the stop tokens count; prompts that are cut to the context are counted; no request
about the model goes to the hub.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from sft_core.data.rendering.templates import ChatTemplate
from sft_core.evaluate.scores import strip_thinking

OPEN, CLOSE = "<think>", "</think>"
_TAIL_TOKENS = 32  # the end of a prompt, in which a template may open the thinking


class ServedLM(HFLM):
    def __init__(self, model: Any, tokenizer: Any, template: ChatTemplate | None, batch_size: int):
        """template: renders prompts; None for prompts in plain text, to which the tokenizer may add a BOS."""
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=None if template is None else False,
            softmax_dtype="float32",
        )
        self.template = template
        self.num_prompts = self.num_cut = 0
        known = tokenizer.get_vocab()
        self._hidden = set(tokenizer.all_special_ids) - {known.get(OPEN), known.get(CLOSE)}
        stops = model.generation_config.eos_token_id
        # Its own settings, not the checkpoint's: a repetition penalty would make a copied word a wrong answer.
        model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt's text. Without a generation prompt the last message is the beginning of the answer."""
        assert self.template is not None, "lm-eval calls this only with apply_chat_template"
        if add_generation_prompt:
            return self.template.render(chat_history, add_generation_prompt=True)
        *history, begun = chat_history
        return self.template.render(history, add_generation_prompt=True) + begun["content"]

    def get_model_info(self) -> dict[str, str]:
        return {}  # lm-eval's own asks the hub for the commit of the model

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """An answer's text without its thought. Think tags are kept until then, even where they are special tokens."""
        if not skip_special_tokens:
            return super().tok_decode(tokens, skip_special_tokens=False)
        text = self.tokenizer.decode([token for token in tokens if token not in self._hidden])
        return strip_thinking(text) if OPEN in text or CLOSE in text else text

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            prompt, settings = request.args
            room = self.max_length - normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            self._count(len(self.tok_encode(prompt)), room)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of the prompt, as in serving, and of the continuation.

        lm-eval's own method moves white space at the prompt's end into the answer. At the end of a rendered prompt this
        gives other tokens than serving does.
        """
        if self.template is None:
            return super()._encode_pair(context, continuation)
        prompt, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        return prompt, self.tok_encode(continuation)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for _, prompt, answer in requests:
            self._count(len(prompt) + len(answer), self.max_length + 1)  # the last token is never read
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _count(self, num_tokens: int, room: int) -> None:
        self.num_prompts += 1
        self.num_cut += num_tokens > room

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        """Tokens of prompts and answers, shape (batch, length). context: the prompts, padded on the left."""
        if not settings.get("do_sample"):
            settings |= {"do_sample": False}
            settings.pop("temperature", None)
        with torch.inference_mode():
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([StopInAnswer(self.tokenizer, stop, context)]),
                use_cache=True,
                **settings,
            )


class StopInAnswer(StoppingCriteria):
    """Ends a row at a stop string of its answer. The same string inside a thought ends nothing."""

    def __init__(self, tokenizer: Any, stops: list[str], prompts_BT: Any):
        self._tokenizer, self._stops, self._start = tokenizer, [stop for stop in stops if stop], prompts_BT.shape[1]
        longest = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in (*self._stops, CLOSE))
        # Inside a text a string may take more tokens than alone.
        self._num_tail = longest + 2
        self._thinking = [text.rfind(OPEN) > text.rfind(CLOSE) for text in self._decoded(prompts_BT[:, -_TAIL_TOKENS:])]
        self._has_thought = [*self._thinking]
        self._done = torch.zeros(len(prompts_BT), dtype=torch.bool, device=prompts_BT.device)

    def _decoded(self, ids_BT: Any) -> list[str]:
        return self._tokenizer.batch_decode(ids_BT, skip_special_tokens=False)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Whether each row is done, shape (batch,)."""
        for row, tail in enumerate(self._decoded(input_ids[:, self._start :][:, -self._num_tail :])):
            if OPEN in tail or CLOSE in tail:
                self._thinking[row] = tail.rfind(OPEN) > tail.rfind(CLOSE)
                self._has_thought[row] = True
                tail = tail.rpartition(CLOSE)[2]
            if self._has_thought[row]:
                tail = tail.lstrip()  # an empty line between thought and answer is no stop string
            if not self._thinking[row] and any(stop in tail for stop in self._stops):
                self._done[row] = True
        return self._done
