"""The trainer against the formula: L = sum of nll over the trained tokens of the global batch / their number."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sft_core.data.packing import PackPlan
from sft_core.data.shards import TokenShards
from sft_core.pins import PinnedRecipe, pin
from sft_core.recipe import parse_recipe
from sft_core.store import Store
from sft_core.train.model import load_model
from sft_core.train.schedule import EMPTY, step_packs
from steps.train import TRAINED
from tests.train.tiny import Run, tiny_recipe


@pytest.fixture(scope="module")
def reference(
    plain_run: Run, make_job: Callable[[PinnedRecipe, Path], dict[str, Any]]
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of each step, and the last weights, of AdamW over documents one at a time."""
    job = make_job(plain_run.pinned, plain_run.folder)
    training = job["training"]
    plan, shards = PackPlan.read(Path(job["packs"])), [TokenShards(Path(folder)) for folder in job["tokens"]]
    model, _ = load_model(**job["model"], tokenizer=job["tokenizer"], seed=training["seed"])
    schedule = step_packs(len(plan), global_batch_size=4, num_epochs=3, max_steps=None, seed=training["seed"])
    assert len(schedule) == 6
    assert (schedule == EMPTY).sum() == 3, "an epoch's last batch is smaller than the others"

    def documents(packs: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for pack in packs[packs != EMPTY]:
            for entry in range(plan.offsets[pack], plan.offsets[pack + 1]):
                row = shards[plan.source[entry]][int(plan.row[entry])]
                yield torch.tensor(row.input_ids.astype("int64")), torch.tensor(row.trained[1:] == 1)

    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.9), eps=1e-8)
    curve = []
    for step, packs in enumerate(schedule):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / len(schedule))
        num_trained = sum(int(mask.sum()) for _, mask in documents(packs))
        loss = 0.0
        for ids, mask in documents(packs):
            nll = F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")
            part = nll[mask].sum() / num_trained
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss, norm))
    return curve, model.state_dict()


def curve_of(run: Run) -> list[tuple[float, float]]:
    return [(event["loss"], event["grad_norm"]) for event in run.events]


def test_curve_one_process_equals_the_reference(plain_run: Run, reference: Any) -> None:
    curve, weights = reference
    found = curve_of(plain_run)
    assert len(found) == 6
    assert found[0][0] == pytest.approx(curve[0][0], rel=1e-6)
    for step, (of_run, of_reference) in enumerate(zip(found, curve, strict=True)):
        assert of_run == pytest.approx(of_reference, rel=1e-5), f"{step=}"
    assert found[-1][0] < found[0][0] - 0.5, "so little was learned that a wrong step could hide"
    assert max(norm for _, norm in found) > 1, "the gradient was never clipped"
    saved = load_file(plain_run.model / "model.safetensors")
    assert len(saved) > 10
    for name, values in saved.items():
        torch.testing.assert_close(values, weights[name], atol=2e-5, rtol=1e-4)


def test_curve_two_processes_equals_one(plain_run: Run, store: Store) -> None:
    pinned = pin(parse_recipe(tiny_recipe(runtime={"num_processes": 2})))
    ref = store.ensure(TRAINED, pinned, round=0)
    run = Run(pinned, store.path(ref))
    for of_two, of_one in zip(curve_of(run), curve_of(plain_run), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-5)
    one, two = (load_file(path / "model.safetensors") for path in (plain_run.model, run.model))
    torch.testing.assert_close(two, one, atol=2e-5, rtol=1e-4)
    counts = store.manifest(ref)["counts"]
    assert counts == {
        "round": 0,
        "steps": 6,
        "first_loss": run.events[0]["loss"],
        "last_loss": run.events[-1]["loss"],
    }
    for name in ("copy_no_think", "checksum_think"):
        assert run.events[0][f"loss/{name}"] == pytest.approx(plain_run.events[0][f"loss/{name}"], rel=1e-5)
    assert sorted(path.name for path in run.folder.iterdir()) == ["logs", "manifest.json", "model"]
