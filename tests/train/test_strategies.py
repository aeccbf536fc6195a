"""One recipe by several strategies: the same curve, gradients and weights; one that is not engaged is told."""

import json
import multiprocessing
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import read_index
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.recipe.rank_strategies import STRATEGIES
from sft_core.store.store import Store
from sft_core.train.job import TrainJob
from sft_core.train.loss import trained_token_nll
from sft_core.train.strategy import CONFIGS, WrongStrategy, check_engaged, environment
from steps.pack import PACKED
from steps.tokenize import TOKENS
from steps.train import TRAINED
from tests.train.tiny import Run, tiny_recipe

NUM_STEPS = 20


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of like length of which next to nothing or next to all is trained; the answers can be learnt."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("rows")
    datasets = []
    for name, asked, answered in (("asks", 60, 4), ("answers", 4, 60)):
        path = folder / f"{name}.jsonl"
        with path.open("w") as file:
            for _ in range(30):
                question, answer = ("".join(rng.choices("abcd", k=n)) for n in (asked, answered))
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "ab" + answer}]
                file.write(json.dumps({"messages": messages}) + "\n")
        datasets.append({"path": str(path)})
    return datasets


def recipe(rows: list[dict[str, Any]], **runtime: Any) -> dict[str, Any]:
    return tiny_recipe(
        dataset_mixture={"datasets": rows, "selection_share": 0.2, "report_share": 0.0},
        evaluation={"during_training": {"every_epochs": 0.5, "keep_best": True}},
        packing={"max_length": 160},  # two rows
        training={"max_steps": NUM_STEPS},
        runtime=runtime,
    )


def trained(store: Store, data: dict[str, Any], folder: Path) -> Run:
    """Trains anew: strategies and ranks are no part of the output's identity."""
    pinned = pin(parse_recipe(data))
    ref = store.ensure(TRAINED, pinned, round=0)
    store.path(ref).rename(folder)
    return Run(pinned, folder)


@pytest.fixture(scope="module")
def one(store: Store, rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One rank that accumulates four packs."""
    return trained(store, recipe(rows), tmp_path_factory.mktemp("runs") / "one")


def curve_of(run: Run) -> list[tuple[float, float]]:
    return [(event["loss"], event["grad_norm"]) for event in run.events]


def selection_of(run: Run) -> list[dict[str, float]]:
    lines = (run.folder / "logs" / "selection.jsonl").read_text().splitlines()
    return [{"step": event["step"], **event["losses"]} for event in map(json.loads, lines)]


@pytest.mark.slow
def test_one_rank_learns_and_its_ranks_would_train_unequal_numbers_of_tokens(one: Run, store: Store) -> None:
    curve = curve_of(one)
    assert len(curve) == NUM_STEPS
    assert curve[-1][0] < curve[0][0] / 2
    plan = PackPlan.read(store.path(store.ensure(PACKED, one.pinned)))
    tokens = [store.path(store.ensure(TOKENS, one.pinned, source=source)) for source in one.pinned.recipe.sources]
    counts = [read_index(folder, ["num_trained"])["num_trained"].to_numpy() for folder in tokens]
    by_pack = [
        sum(counts[plan.source[entry]][plan.row[entry]] for entry in range(plan.offsets[pack], plan.offsets[pack + 1]))
        for pack in range(len(plan))
    ]
    assert max(by_pack) > 3 * min(by_pack)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_ranks_by_any_strategy_equal_one(
    strategy: str, one: Run, store: Store, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    two = trained(store, recipe(rows, num_processes=2, distributed=strategy), tmp_path / "two")
    for step, (of_two, of_one) in enumerate(zip(curve_of(two), curve_of(one), strict=True)):
        assert of_two == pytest.approx(of_one, rel=1e-5), f"{step=}"
    weights, expected = (load_file(run.model / "model.safetensors") for run in (two, one))
    torch.testing.assert_close(weights, expected, atol=5e-5, rtol=1e-4)
    for name in ("loss/asks", "loss/answers"):
        found, expected = ([event[name] for event in run.events if name in event] for run in (two, one))
        assert found == pytest.approx(expected, rel=1e-4)
    assert selection_of(two) == [pytest.approx(losses, rel=1e-4) for losses in selection_of(one)]
    assert sorted(path.name for path in two.folder.iterdir()) == ["logs", "manifest.json", "model"]


@pytest.mark.long
def test_fsdp2_without_an_accelerator_is_told_and_not_trained_as_ddp(store: Store, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(RuntimeError, match=r"asked for fsdp2 on 2 ranks \(cpu\), and ddp is engaged"):
        store.ensure(TRAINED, pin(parse_recipe(recipe(rows, num_processes=2, distributed="fsdp2"))), round=0)


def test_strategies_have_a_config_each() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == STRATEGIES.keys() and len(STRATEGIES) > 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_environment_is_what_accelerate_launch_sets(strategy: str) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = ["--config_file", str(CONFIGS / f"{strategy}.yaml"), "--main_process_port", "0", "-m", "a.module"]
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    parsed.deepspeed_fields_from_accelerate_config = ""  # as launch_command sets it
    theirs = prepare_deepspeed_cmd_env(parsed)[1] if parsed.use_deepspeed else prepare_multi_gpu_env(parsed)
    ours = environment(strategy)
    assert {name: theirs.get(name) for name in ours} == ours
    assert ("ACCELERATE_USE_DEEPSPEED" in theirs, "ACCELERATE_USE_FSDP" in theirs) == (
        strategy.startswith("zero"),
        strategy == "fsdp2",
    )


def test_check_engaged_tells_a_plain_model_from_the_strategies() -> None:
    from accelerate import Accelerator

    alone = Accelerator(cpu=True)
    check_engaged("ddp", alone, torch.nn.Linear(2, 2))
    for strategy in ("fsdp2", "zero2", "zero3"):
        with pytest.raises(WrongStrategy, match=f"asked for {strategy}"):
            check_engaged(strategy, alone, torch.nn.Linear(2, 2))


def sharded_rank(rank: int, port: int, job: TrainJob, schedule: list[list[int]], out: str) -> None:
    """SGD over the schedule by torch's fully_shard, our loss and our data; rank 0 writes losses and weights."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from sft_core.train.collate import PackCollator
    from sft_core.train.loss import trained_token_nll
    from sft_core.train.models.model import load_model

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, _ = load_model(job.spec.model, job.spec.tokenizer, seed=job.spec.training.seed)
    collator = PackCollator.open(job.packs, job.tokens)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for packs in schedule:
        batches = [collator([{"pack": pack}]) for pack in packs[rank::2]]
        count = torch.stack([batch["weights"].sum() for batch in batches]).sum()
        dist.all_reduce(count)
        loss = torch.zeros(())
        for batch in batches:
            nll_N = trained_token_nll(model, batch)
            part = nll_N.sum() / count * 2  # fully_shard averages over the ranks, as DDP does
            part.backward()
            loss += part.detach() / 2
        dist.all_reduce(loss)
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if rank == 0:
        torch.save({"losses": losses, "weights": weights}, out)
    dist.destroy_process_group()


@pytest.mark.long
def test_fsdp2_by_torch_itself_equals_one_rank(
    one: Run, make_job: Callable[[PinnedRecipe, Path], TrainJob], tmp_path: Path
) -> None:
    from sft_core.train.collate import PackCollator
    from sft_core.train.models.model import load_model

    job = make_job(one.pinned, tmp_path)
    collator = PackCollator.open(job.packs, job.tokens)
    schedule = np.random.default_rng(0).permutation(len(collator.plan))[:24].reshape(6, 4).tolist()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    out = str(tmp_path / "sharded.pt")
    ranks = [context.Process(target=sharded_rank, args=(rank, port, job, schedule, out)) for rank in range(2)]
    for rank in ranks:
        rank.start()

    model, _ = load_model(job.spec.model, job.spec.tokenizer, seed=job.spec.training.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for packs in schedule:
        batches = [collator([{"pack": pack}]) for pack in packs]
        count = sum(float(batch["weights"].sum()) for batch in batches)
        parts = [trained_token_nll(model, batch).sum() / count for batch in batches]
        torch.stack(parts).sum().backward()
        losses.append(float(sum(part.item() for part in parts)))
        optimizer.step()
        optimizer.zero_grad()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    found = torch.load(out)
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.1
    torch.testing.assert_close(found["weights"], model.state_dict(), atol=1e-6, rtol=1e-4)
