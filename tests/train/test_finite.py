"""Training ends at the first number that is not finite, and names its rows; nothing of it is logged or saved."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_core.data.shards.token_shards import read_index, read_windows, row_ids
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.train import finite, trainer
from sft_core.train.assemble import name_rows
from sft_core.train.checkpoints import numbered
from sft_core.train.collate import PackCollator
from sft_core.train.finite import NotFiniteError, check_weights
from sft_core.train.job import TrainJob
from sft_core.train.loss import Losses, trained_losses
from tests.train.ranks import Attempt, error_of, rank
from tests.train.tiny import Run, tiny_recipe

ENTRY = 5  # a document of the plan
MakeJob = Callable[..., TrainJob]


def spoiled(model: Any, batch: Any, forward: Any, *, times: list[int], **kwargs: Any) -> Losses:
    """The losses, infinite for the last token of ENTRY from its second epoch on. times: how often it was there."""
    losses = trained_losses(model, batch, forward, **kwargs)
    here = np.flatnonzero(np.repeat(batch["entries"], batch["num_targets"]) == ENTRY)
    times[0] += len(here) > 0
    if not len(here) or times[0] < 2:
        return losses
    factor = torch.ones(len(losses.nll_N))
    factor[here[-1]] = math.inf
    return losses._replace(nll_N=losses.nll_N * factor)


def rank_that_spoils(job: str, number: int, size: int, port: int, log: str) -> None:
    trainer.trained_losses = functools.partial(spoiled, times=[0])  # type: ignore[assignment]
    rank(job, number, size, port, log)


def row_of_entry(job: TrainJob) -> str:
    """ENTRY as a message names it, by the index."""
    plan = PackCollator.open(job.packs, job.tokens).plan
    source, row = int(plan.source[ENTRY]), int(plan.row[ENTRY])
    return f"{job.spec.sources[source]}: {read_index(job.tokens[source][0])['row_id'][row].as_py()}"


@pytest.mark.slow
def test_loss_that_is_not_finite_ends_training_with_its_row(
    train_here: Callable[..., Run], make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(runtime={"logging_steps": 100, "save_steps": 2})
    monkeypatch.setattr(trainer, "trained_losses", functools.partial(spoiled, times=[0]))
    with pytest.raises(NotFiniteError, match=r"\Astep [34]: the loss is not finite") as error:
        train_here(recipe, tmp_path)
    assert f"Its rows: {row_of_entry(make_job(pin(parse_recipe(recipe)), tmp_path))} (" in str(error.value)
    assert [path.name for path in numbered(tmp_path / "checkpoints")] == ["checkpoint-2"]
    assert not (tmp_path / "model").exists()
    lines = [json.loads(line) for line in (tmp_path / "logs" / "log.jsonl").read_text().splitlines()]
    assert lines and all(line["step"] <= 2 and math.isfinite(line["loss"]) for line in lines)


@pytest.mark.slow
def test_steps_are_checked_though_nothing_is_logged(
    train_here: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "MAX_STEPS", 2)
    times = [0]
    monkeypatch.setattr(trainer, "trained_losses", functools.partial(spoiled, times=times))
    with pytest.raises(NotFiniteError, match=r"\Astep [34]: the loss is not finite"):
        train_here(tiny_recipe(training={"num_train_epochs": 50}, runtime={"logging_steps": 1000}), tmp_path)
    assert times[0] <= 3, "epochs begun until the step is checked"
    assert len((tmp_path / "logs" / "log.jsonl").read_text().splitlines()) == 1  # of the first step


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_loss_of_one_rank_ends_all_with_the_same_message(
    strategy: str, start_ranks: Callable[..., Attempt], make_job: MakeJob, tmp_path: Path
) -> None:
    recipe = tiny_recipe(runtime={"num_processes": 2, "distributed": strategy, "save_steps": 2})
    assert start_ranks(recipe, tmp_path, 2, rank_that_spoils).wait(120)
    rows = row_of_entry(make_job(pin(parse_recipe(recipe)), tmp_path))
    messages = [line for line in error_of(tmp_path).splitlines() if line.startswith("sft_core.train.finite.NotFinite")]
    assert len(messages) == 2 and len(set(messages)) == 1, error_of(tmp_path)
    assert "the loss is not finite" in messages[0] and f"Its rows: {rows} (" in messages[0]
    assert [path.name for path in numbered(tmp_path / "checkpoints")] == ["checkpoint-2"]


def test_training_that_diverges_saves_no_weights_of_it(train_here: Callable[..., Run], tmp_path: Path) -> None:
    recipe = tiny_recipe(training={"learning_rate": 1e38, "weight_decay": 0.0}, runtime={"save_steps": 1})
    with pytest.raises(NotFiniteError):
        train_here(recipe, tmp_path)
    assert not (tmp_path / "model").exists()
    for checkpoint in numbered(tmp_path / "checkpoints"):
        from safetensors.torch import load_file

        check_weights(load_file(checkpoint / "model.safetensors").items(), checkpoint.name)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [math.inf, math.nan, torch.tensor(math.nan)])
def test_gradients_that_are_not_finite_end_training_before_a_line_of_the_log(
    norm: Any, train_here: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = trainer.SFTTrainer._get_grad_norm

    def overflow(self: Any, model: Any, grad_norm: Any = None) -> Any:
        plain = base(self, model, grad_norm=grad_norm)
        return norm if self.state.global_step == 2 else plain

    monkeypatch.setattr(trainer.SFTTrainer, "_get_grad_norm", overflow)
    with pytest.raises(NotFiniteError, match=r"step 3: the norm of the gradients is not finite") as error:
        train_here(tiny_recipe(), tmp_path)
    assert " more (" in str(error.value)  # all rows of the step
    lines = [json.loads(line) for line in (tmp_path / "logs" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_check_names_the_tensors() -> None:
    tensors = {f"layer{number}": torch.ones(3) for number in range(12)}
    check_weights(tensors.items(), "x")
    check_weights({"whole": torch.ones(2, dtype=torch.int8), "empty": torch.ones(0)}.items(), "x")
    tensors["layer3"][1] = math.nan
    with pytest.raises(NotFiniteError, match=r"\Ax: 1 of 12 tensors hold infinities or NaN: layer3\Z"):
        check_weights(tensors.items(), "x")
    for tensor in tensors.values():
        tensor[0] = -math.inf
    with pytest.raises(NotFiniteError, match=r"12 of 12 .*layer7 and 4 more\Z"):
        check_weights(tensors.items(), "x")


def test_window_has_the_id_of_its_row(make_job: MakeJob, tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"copy: {letter * 9}"} for letter in "abcd" for role in ("user", "assistant")]
    rows = [{"messages": [{"role": "user", "content": f"hello {n}"}, turns[1], *turns[:6]]} for n in range(20)]
    (tmp_path / "talks.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    mixture = {"datasets": [{"path": str(tmp_path / "talks.jsonl")}]}
    recipe = tiny_recipe(dataset_mixture=mixture, packing={"max_length": 80, "over_long": "split"})
    job = make_job(pin(parse_recipe(recipe)), tmp_path)
    ((tokens, windows),) = job.tokens
    index, of_row = read_index(tokens)["row_id"].to_pylist(), read_windows(tokens, windows).of_row
    assert len(of_row) > len(index) > 8  # each row is cut into several windows
    numbers = np.array([3, len(index), len(index) + 5])
    assert row_ids([tokens, windows], numbers) == [index[3], index[of_row[0]], index[of_row[5]]]
    plan = PackCollator.open(job.packs, job.tokens).plan
    names = name_rows(plan, job.tokens, job.spec.sources, np.arange(len(plan.row)))
    assert names.startswith("talks: ") and names.endswith(f" and {len(set(plan.row)) - 8} more")
    assert set(names.removeprefix("talks: ").partition(" and ")[0].split(", ")) <= set(index)
