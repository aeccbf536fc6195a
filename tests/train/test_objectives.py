"""Objectives: SFT's, one over pairs of documents, and that the trainer lowers the objective that it is given."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import TokenRow, TokenShards
from sft_core.pins.pinned import PinnedRecipe
from sft_core.train import assemble
from sft_core.train.collate import Batch, collate
from sft_core.train.job import TrainJob
from sft_core.train.loss import Forward, trained_losses
from sft_core.train.models.model import load_model
from sft_core.train.objectives.objective import Objective
from sft_core.train.objectives.sft import Sft
from sft_core.train.schedule import step_packs
from tests.train.test_loss import nll_of_each, random_documents, tiny_model
from tests.train.test_objective import costs_of, documents_of
from tests.train.tiny import Run, tiny_recipe

BETA = 0.1
Document = tuple[TokenRow, int]


def of_documents(values_N: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.zeros(len(batch["lengths"])).index_add(0, batch["document"], values_N)


class Pairs:
    """Direct preference optimisation (arXiv 2305.18290): of each two documents of a pack the first is preferred."""

    def __init__(self, reference: dict[bytes, float]):
        self._reference = reference  # negative log-likelihood of each document by the reference model

    def amount(self, batch: Batch) -> float:
        return len(batch["lengths"]) // 2

    def total(self, nll_N: torch.Tensor, batch: Batch) -> torch.Tensor:
        documents = batch["input_ids"][0].split(batch["lengths"].tolist())
        known = torch.tensor([self._reference.get(ids.numpy().tobytes(), 0.0) for ids in documents])
        gain = known - of_documents(nll_N, batch)
        pairs = int(self.amount(batch))
        return -F.logsigmoid(BETA * (gain[0 : 2 * pairs : 2] - gain[1 : 2 * pairs : 2])).sum()


def loss_and_gradient(
    objective: Objective, model: torch.nn.Module, batches: list[Batch], forward: Forward
) -> tuple[float, list[torch.Tensor]]:
    """Of a global batch, as the trainer computes it from its micro-batches."""
    model.zero_grad()
    amount = sum(objective.amount(batch) for batch in batches)
    loss = 0.0
    for batch in batches:
        part = objective.total(trained_losses(model, batch, forward).nll_N, batch) / amount
        part.backward()
        loss += part.item()
    return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def pair_documents() -> list[Document]:
    documents = random_documents(9, 7, 14, 5, 11, 12)
    for row, _ in documents:
        row.trained[-1] = 1
    return documents


@pytest.mark.parametrize("alone", [False, True])
def test_pairs_of_documents_fit_however_a_batch_is_divided(alone: bool) -> None:
    model, documents = tiny_model("llama"), pair_documents()
    torch.manual_seed(1)
    with torch.no_grad():
        reference = [
            float(nll_of_each(model, [document]).sum()) + 3 * place for place, document in enumerate(documents)
        ]
    objective = Pairs(
        {row.input_ids.astype(np.int64).tobytes(): nll for (row, _), nll in zip(documents, reference, strict=True)}
    )
    model.zero_grad()
    gains = torch.stack(
        [known - nll_of_each(model, [one]).sum() for known, one in zip(reference, documents, strict=True)]
    )
    expected = -F.logsigmoid(BETA * (gains[0::2] - gains[1::2])).mean()
    expected.backward()
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    pairs = [documents[first : first + 2] for first in (0, 2, 4)]
    divisions = [[collate(*pairs)], [collate(pairs[0], pairs[1]), collate(pairs[2])], [*map(collate, pairs), collate()]]
    for batches in divisions:
        loss, found = loss_and_gradient(objective, model, batches, Forward(alone=alone))
        assert loss == pytest.approx(float(expected), rel=1e-5) and loss > 0.7
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)


def test_sft_of_a_batch_is_the_weighted_sum_and_its_weight() -> None:
    row = TokenRow(np.arange(6, dtype=np.int32), np.array([0, 1, 1, 0, 1, 1], np.uint8))
    batch = collate([(row, 0)])
    batch["weights"] = torch.tensor([1.0, 0.5, 1.0, 0.25])
    batch["weight"] = float(batch["weights"].sum())
    nll_N = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    objective = Sft()
    assert objective.amount(batch) == 2.75
    total = objective.total(nll_N, batch)
    assert float(total) == 1.0 + 1.0 + 3.0 + 1.0
    total.backward()
    assert torch.equal(nll_N.grad, batch["weights"])


class MeanOfDocuments:
    """Each document counts alike, whatever its length."""

    def amount(self, batch: Batch) -> float:
        return int((batch["num_targets"] > 0).sum())

    def total(self, nll_N: torch.Tensor, batch: Batch) -> torch.Tensor:
        counts = torch.from_numpy(batch["num_targets"]).clamp(min=1)
        return (of_documents(nll_N, batch) / counts).sum()


def test_trainer_lowers_the_objective_that_it_is_given(
    train_here: Callable[..., Run],
    make_job: Callable[[PinnedRecipe, Path], TrainJob],
    plain_run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assemble, "Sft", MeanOfDocuments)
    run = train_here(tiny_recipe(training={"max_steps": 1}))
    job = make_job(run.pinned, run.folder)
    plan, shards = PackPlan.read(job.packs), [TokenShards(*folders) for folders in job.tokens]
    model, _ = load_model(job.spec.model, job.spec.tokenizer, seed=42)
    (packs,) = step_packs(costs_of(plan, model), global_batch_size=4, num_epochs=1, max_steps=1, seed=42)
    with torch.no_grad():
        means = [
            F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")[mask].mean()
            for ids, mask in documents_of(plan, shards, packs)
        ]
    (event,), first = run.events, plain_run.events[0]
    assert event["loss"] == pytest.approx(float(torch.stack(means).mean()), rel=1e-6)
    assert event["loss"] != pytest.approx(first["loss"], rel=1e-3), "the mean over tokens is another one"
    by_source = {name: value for name, value in first.items() if name.startswith("loss/")}
    assert len(by_source) == 2 and {name: event[name] for name in by_source} == by_source, "the log's are of tokens"
