"""Selection rows scored by answers: what a forward pass settles is what generating would have given."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_core.evaluate import selection_answers as module
from sft_core.evaluate.selection_answers import AnswerScores, AnswerSettings
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from sft_core.train.collate import PackCollator
from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.loss import Forward, trained_token_nll
from sft_core.train.models.model import load_model
from sft_core.train.row_losses import RowLosses
from sft_core.train.selection import SelectionLosses
from steps.metrics import scoring_of_answers
from steps.selection import SELECTION
from steps.tokenize import TOKENS
from tests.train.tiny import QUICKSTART, SOURCES, tiny_recipe


class World:
    """Selection rows of two tasks, and a model that has half learnt them."""

    def __init__(self, folder: Path, paths: list[Path] | None = None, **evaluation: Any):
        data = tiny_recipe(dataset_mixture={"selection_share": 0.4}, evaluation=evaluation)
        if paths is not None:
            data["dataset_mixture"]["datasets"] = [{"path": str(path)} for path in paths]
        del data["training"]["num_train_epochs"]
        search = {"strategy": "sft", "score": "answers", "max_rows": 20}
        self.pinned = pin(parse_recipe({**data, "search": search}))
        store = Store(folder)
        self.tokens = [[store.path(store.ensure(TOKENS, self.pinned, source=source))] for source in SOURCES]
        self.packs = store.path(store.ensure(SELECTION, self.pinned))
        self.collator = PackCollator.open(self.packs, self.tokens)
        loader = {**self.pinned.model_loader, "stop_tokens": []}
        self.model, self.tokenizer = load_model(
            ModelLoader(**loader), TokenizerLoader(**self.pinned.tokenizer_loader), seed=0
        )

    def learn(self, num_steps: int) -> None:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        for step in range(num_steps):
            nll = trained_token_nll(self.model, self.collator([{"pack": step % len(self.collator.plan)}]))
            nll.mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def losses(self) -> RowLosses:
        alone: dict[str, Any] = {"device": torch.device("cpu"), "rank": 0, "num_ranks": 1}
        found = SelectionLosses(self.collator).measure(
            self.model, **alone, sum_over_ranks=lambda values: values, forward=Forward(), count_correct=True
        )
        self.model.eval()
        return found

    def scorer(self) -> AnswerScores:
        asked = {source: scoring_of_answers(self.pinned, source) for source in SOURCES}
        return AnswerScores(
            self.collator.plan,
            list(SOURCES),
            self.tokens,
            {source: AnswerSettings(**settings) for source, settings in asked.items()},
            {},
            self.tokenizer,
            batch_size=8,
            flops_a_token=2.0,
        )


def score(scorer: AnswerScores, world: World, losses: RowLosses, rank: int = 0, num_ranks: int = 1) -> Any:
    return scorer.score(world.model, losses, rank=rank, num_ranks=num_ranks, sum_over_ranks=lambda values: values)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("answers"), max_new_tokens=24)
    made.learn(150)
    return made


@pytest.mark.slow
def test_answers_settled_by_a_forward_pass_score_as_if_they_were_generated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[int] = []

    def counting(*args: Any, **options: Any) -> Any:
        generated.extend(range(len(args[2].prompts)))
        return generate(*args, **options)

    generate = module.generate_outputs
    monkeypatch.setattr(module, "generate_outputs", counting)
    losses, scorer = world.losses(), world.scorer()
    with scorer.ready(world.model):
        found, flops = score(scorer, world, losses)
        num_settled = len(losses.nll) - len(generated)
        assert 3 <= num_settled <= len(losses.nll) - 3, "the model has learnt some rows and not others"
        assert flops > 0
        nothing = RowLosses(losses.nll, losses.num_trained, losses.source, np.zeros_like(losses.nll))
        generated.clear()
        everything, more = score(scorer, world, nothing)
        assert len(generated) == len(losses.nll)
    assert found.tolist() == everything.tolist()
    assert 0 < found.mean() < 1 and more > flops


def test_answers_are_shared_by_ranks(world: World) -> None:
    losses, scorer = world.losses(), world.scorer()
    with scorer.ready(world.model):
        alone, flops = score(scorer, world, losses)
        parts = [score(scorer, world, losses, rank, 3) for rank in range(3)]
    assert sum(scores for scores, _ in parts).tolist() == alone.tolist()
    assert sum(one for _, one in parts) == pytest.approx(flops)


def test_answer_that_is_longer_than_may_be_generated_is_not_settled(tmp_path: Path, world: World) -> None:
    short = World(tmp_path, max_new_tokens=2)
    short.model = world.model
    losses, scorer = short.losses(), short.scorer()
    all_right = RowLosses(losses.nll, losses.num_trained, losses.source, losses.num_trained)
    with scorer.ready(short.model):
        found = sum(score(scorer, short, all_right, rank, 3)[0] for rank in range(3))
    assert found.max() == 0.0, "two tokens are no whole answer"


def test_task_without_a_row_to_ask_is_refused(tmp_path: Path, world: World) -> None:
    rows = [json.loads(line) for line in (QUICKSTART / f"{SOURCES[0]}.jsonl").read_text().splitlines()[:60]]
    (tmp_path / f"{SOURCES[0]}.jsonl").write_text(
        "".join(json.dumps({name: value for name, value in row.items() if name != "answer"}) + "\n" for row in rows)
    )
    paths = [tmp_path / f"{SOURCES[0]}.jsonl", QUICKSTART / f"{SOURCES[1]}.jsonl"]
    unanswered = World(tmp_path / "store", paths=paths)
    scorer = unanswered.scorer()
    with pytest.raises(ValueError, match=f"selection rows of {SOURCES[0]} has an answer"), scorer.ready(world.model):
        pass
