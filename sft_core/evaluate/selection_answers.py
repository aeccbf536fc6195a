"""Selection rows scored by their answers: those that a forward pass settles at once, the others generated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft_core.data.packing import PackPlan
from sft_core.data.shards import TokenRow, TokenShards, read_index
from sft_core.evaluate.answers import asked_of, generate_outputs, served_prompt, stop_ids, trained_turn, without_stop
from sft_core.evaluate.generate import WithTransformers
from sft_core.evaluate.metrics import strip_thinking
from sft_core.evaluate.scorers import Asked, Metric, load_metric
from sft_core.train.row_losses import RowLosses


class AnswerScores:
    """Greedy answers to the selection rows that have one to score, by their task's metric, 0 to 1.

    A row whose trained tokens all are the likeliest is answered with them: that much the losses tell, and greedy
    decoding would write the same. Only the other rows are generated, where another text may still be right.

    plan: the selection rows. tokens: each source's folders. asked_by_task: of each task its metric's identity and
    max_new_tokens. conversations: of the tasks whose metric wants them.
    """

    def __init__(
        self,
        plan: PackPlan,
        sources: list[str],
        tokens: list[list[Path]],
        asked_by_task: Mapping[str, Mapping[str, Any]],
        conversations: Mapping[str, Path],
        tokenizer: Any,
        *,
        batch_size: int | None,
        flops_a_token: float,
    ):
        self._plan, self._sources, self._folders = plan, sources, tokens
        self._by_task, self._conversations = asked_by_task, conversations
        self._tokenizer, self._batch_size, self._flops_a_token = tokenizer, batch_size, flops_a_token
        self._metrics: dict[str, Metric] = {}
        self._rows: dict[int, TokenRow] = {}  # by their number in the plan, those that are asked
        self._asked: dict[int, Asked] = {}
        self._own: dict[int, float] = {}  # what the row's own turn scores

    @contextlib.contextmanager
    def ready(self, model: Any) -> Iterator[None]:
        """Reads what the rows ask. Raises ValueError for a task of which no row can be asked."""
        with contextlib.ExitStack() as stack:
            for task, asked in self._by_task.items():
                self._metrics[task] = stack.enter_context(load_metric(dict(asked["metric"])))
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
        """Of each selection row, shape (rows,), NaN where it is not asked; and the FLOPs of what was generated.

        losses: those of the same weights, with num_correct. The ranks share the rows; all get the result.
        """
        assert losses.num_correct is not None
        found = torch.zeros(len(self._plan.row) + 1, dtype=torch.float64, device=model.device)
        settled = losses.num_correct == losses.num_trained
        engine, stops = WithTransformers(model, self._tokenizer.pad_token_id, self._batch_size), stop_ids(model)
        for place, number in enumerate(self._asked):
            if self._is_within(number) and settled[number] and place % num_ranks == rank:
                found[number] = self._own[number]
        for task in self._by_task:
            open_ = [number for number in self._of(task) if not (settled[number] and self._is_within(number))]
            mine = open_[rank::num_ranks]
            prompts = {number: served_prompt(self._rows[number]) for number in mine}
            outputs = generate_outputs(
                engine, self._tokenizer, stops, prompts, {}, None, self._by_task[task]["max_new_tokens"]
            )
            for number in mine:
                text = strip_thinking(outputs[number][0].text)
                found[number] = self._metrics[task].score(text, self._asked[number].wanted)
                found[-1] += len(prompts[number]) + outputs[number][0].num_tokens
        *scores, num_tokens = sum_over_ranks(found).tolist()
        is_asked = np.isin(np.arange(len(scores)), list(self._asked))
        return np.where(is_asked, scores, np.nan), num_tokens * self._flops_a_token

    def _read(self, task: str, model: Any) -> None:
        source, stops = self._sources.index(task), stop_ids(model)
        numbers = np.flatnonzero(self._plan.source == source)
        at = self._plan.row[numbers]
        index = read_index(self._folders[source][0], columns=["row_id", "answer"]).take(at)
        shards = TokenShards(*self._folders[source])
        rows = [shards[int(row)] for row in at]
        asked = asked_of(self._metrics[task], index, rows, stops, self._tokenizer, self._conversations.get(task))
        if not asked:
            raise ValueError(
                f"search.score: found 'answers', and none of the {len(rows)} selection rows of {task} asks for one by "
                f"the metric {self._metrics[task].name}; score it by loss, or leave the task out"
            )
        for place, wanted in asked.items():
            row, number = rows[place], int(numbers[place])
            self._rows[number], self._asked[number] = row, wanted
            target = self._tokenizer.decode(without_stop(trained_turn(row), stops), skip_special_tokens=False)
            self._own[number] = self._metrics[task].score(strip_thinking(target), wanted.wanted)

    def _of(self, task: str) -> list[int]:
        source = self._sources.index(task)
        return [number for number in self._asked if self._plan.source[number] == source]

    def _is_within(self, number: int) -> bool:
        """Whether the row's own turn is not longer than what may be generated."""
        task = self._sources[self._plan.source[number]]
        return len(trained_turn(self._rows[number])) <= self._by_task[task]["max_new_tokens"]
