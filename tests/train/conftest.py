"""Training runs that several tests look at."""

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.stage import Build
from sft_core.store.store import Store
from sft_core.train.checkpoints import stop_request
from sft_core.train.job import TrainJob, write_job
from sft_core.train.launch import job_here
from steps.train import TRAINED
from tests.train.ranks import Attempt, rank
from tests.train.tiny import Run, tiny_recipe


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def make_job(store: Store) -> Callable[[PinnedRecipe, Path], TrainJob]:
    """The job of one rank, as the launcher writes it, over packs that the real stages made."""

    def make(pinned: PinnedRecipe, out: Path) -> TrainJob:
        needs = TRAINED.needs(pinned, {"round": 0})
        folders = {name: store.path(store.ensure(stage, pinned, **part)) for name, (stage, part) in needs.items()}
        spec = TRAINED.loaders(pinned, {"round": 0})["job"]
        return job_here(Build(out, folders, pinned.recipe.runtime), spec, 0)

    return make


@pytest.fixture(scope="session")
def train_here(
    make_job: Callable[[PinnedRecipe, Path], TrainJob], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """Trains a recipe in this process, by the function that a rank runs; in the folder of an earlier run if given."""

    def run(recipe: dict[str, Any], out: Path | None = None) -> Run:
        from sft_core.train.main import train
        from sft_core.train.merge import merge

        pinned, out = pin(parse_recipe(recipe)), out or tmp_path_factory.mktemp("trained")
        (out / "logs").mkdir(exist_ok=True)
        job = make_job(pinned, out)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with pytest.MonkeyPatch.context() as environment:
            # What torchrun gives a rank that is alone, and the launcher: without it accelerate takes all cores.
            environment.setenv("OMP_NUM_THREADS", "1")
            group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for name, value in group.items():
                environment.setenv(name, str(value))
            train(job)
        if job.spec.training.lora is not None:
            merge(job)
        return Run(pinned, out)

    return run


@pytest.fixture(scope="session")
def plain_run(train_here: Callable[..., Run]) -> Run:
    """6 steps of the tiny recipe: one process, 4 packs accumulated a step."""
    return train_here(tiny_recipe())


@pytest.fixture(scope="session")
def libraries() -> None:
    """Ranks are forked from a process that has loaded what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["trl", "datasets", "peft", "sft_core.train.assemble", "sft_core.train.main", "tests.train.ranks"]
    )
    first = context.Process(target=int)
    first.start()
    first.join()


@pytest.fixture(scope="session")
def start_ranks(libraries: None, make_job: Callable[[PinnedRecipe, Path], TrainJob]) -> Callable[..., Attempt]:
    """Starts the ranks of a recipe in a folder, which may be that of an earlier start."""

    def start(recipe: dict[str, Any], out: Path, size: int, target: Callable[..., None] = rank) -> Attempt:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        for stale in (*out.glob("error-rank*.txt"), *out.glob(stop_request(out).name)):  # as the launcher does
            stale.unlink()
        job = write_job(make_job(pin(parse_recipe(recipe)), out), out)
        return Attempt(job, size, out / "logs" / "ranks.log", target)

    return start
