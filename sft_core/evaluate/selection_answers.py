"""Selection rows scored by their answers. Where a forward pass already shows the answer, nothing is generated."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import TokenRow, TokenShards, read_index
from sft_core.evaluate.answers import asked_of, generate_outputs, served_prompt, stop_ids, trained_turn, without_stop
from sft_core.evaluate.engine import Request
from sft_core.evaluate.generate import WithTransformers
from sft_core.evaluate.metrics.metric import Asked, Metric
from sft_core.evaluate.metrics.registry import load_metric
from sft_core.evaluate.scores import strip_thinking
from sft_core.train.row_losses import RowLosses

if TYPE_CHECKING:
    from pydantic import JsonValue


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """How a task's answers are generated and scored."""

    metric: Mapping[str, JsonValue]  # registry.metric_identity
    max_new_tokens: int


class AnswerScores:
    """Scores the greedy answers to the selection rows by their task's metric, 0 to 1.

    Where all trained tokens of a row are the likeliest, greedy decoding would write exactly its trained turn, so the
    turn is the answer. Other rows get a generated answer, which may be right in other words.

    plan: the selection rows. tokens: each source's folders. conversations: of the tasks whose metric asks for them.
    """

    def __init__(
        self,
        plan: PackPlan,
        sources: list[str],
        tokens: list[list[Path]],
        settings: Mapping[str, AnswerSettings],
        conversations: Mapping[str, Path],
        tokenizer: Any,
        *,
        batch_size: int | None,
        flops_a_token: float,
    ):
        self._plan, self._sources, self._folders = plan, sources, tokens
        self._settings, self._conversations = settings, conversations
        self._tokenizer, self._batch_size, self._flops_a_token = tokenizer, batch_size, flops_a_token
        self._metrics: dict[str, Metric] = {}
        # The asked rows, by their number in the plan.
        self._rows: dict[int, TokenRow] = {}
        self._asked: dict[int, Asked] = {}
        self._turn_scores: dict[int, float] = {}  # the score of the row's trained turn

    @contextlib.contextmanager
    def ready(self, model: Any) -> Iterator[None]:
        """Reads the rows; inside it `score` can be called. Raises ValueError for a task without a row to ask."""
        with contextlib.ExitStack() as stack:
            for task, settings in self._settings.items():
                self._metrics[task] = stack.enter_context(load_metric(settings.metric))
                self._read(task, model)
            yield

    def score(
        self,
        model: Any,
        losses: RowLosses,
        *,
        rank: int,
        num_ranks: int,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[np.ndarray, float]:
        """The score of each selection row, shape (rows,), NaN where it is not asked; and the FLOPs of generating.

        losses: by the same weights, with num_correct. The ranks share the rows; all get the result.
        """
        assert losses.num_correct is not None
        # The last entry counts tokens.
        sums = torch.zeros(len(self._plan.row) + 1, dtype=torch.float64, device=model.device)
        settled = losses.num_correct == losses.num_trained
        engine, stops = WithTransformers(model, self._tokenizer.pad_token_id, self._batch_size), stop_ids(model)
        for place, number in enumerate(self._asked):
            if self._is_within(number) and settled[number] and place % num_ranks == rank:
                sums[number] = self._turn_scores[number]
        for task, settings in self._settings.items():
            unsettled = [number for number in self._of(task) if not (settled[number] and self._is_within(number))]
            numbers = unsettled[rank::num_ranks]
            prompts = [served_prompt(self._rows[number]) for number in numbers]
            request = Request(prompts, stops, settings.max_new_tokens)
            outputs = generate_outputs(engine, self._tokenizer, request)
            for number, prompt, (output,) in zip(numbers, prompts, outputs, strict=True):
                text = strip_thinking(output.text)
                sums[number] = self._metrics[task].score(text, self._asked[number].wanted)
                sums[-1] += len(prompt) + output.num_tokens
        *scores, num_tokens = sum_over_ranks(sums).tolist()
        is_asked = np.isin(np.arange(len(scores)), list(self._asked))
        return np.where(is_asked, scores, np.nan), num_tokens * self._flops_a_token

    def _read(self, task: str, model: Any) -> None:
        source, stops = self._sources.index(task), stop_ids(model)
        numbers = np.flatnonzero(self._plan.source == source)
        row_numbers = self._plan.row[numbers]
        index = read_index(self._folders[source][0], columns=["row_id", "answer"]).take(row_numbers)
        shards = TokenShards(*self._folders[source])
        rows = [shards[int(number)] for number in row_numbers]
        asked = asked_of(self._metrics[task], index, rows, stops, self._tokenizer, self._conversations.get(task))
        if not asked:
            raise ValueError(
                f"search.score: found 'answers', and none of the {len(rows)} selection rows of {task} has an answer "
                f"for the metric {self._metrics[task].name}; score it by loss, or leave the task out"
            )
        for place, asked_row in asked.items():
            row, number = rows[place], int(numbers[place])
            self._rows[number], self._asked[number] = row, asked_row
            target = self._tokenizer.decode(without_stop(trained_turn(row), stops), skip_special_tokens=False)
            self._turn_scores[number] = self._metrics[task].score(strip_thinking(target), asked_row.wanted)

    def _of(self, task: str) -> list[int]:
        source = self._sources.index(task)
        return [number for number in self._asked if self._plan.source[number] == source]

    def _is_within(self, number: int) -> bool:
        """Whether the row's trained turn is not longer than an answer may be."""
        task = self._sources[self._plan.source[number]]
        return len(trained_turn(self._rows[number])) <= self._settings[task].max_new_tokens
