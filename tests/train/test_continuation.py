"""What a checkpoint tells of the ranks that wrote it, and what others take from it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sft_core.train.checkpoints import publish
from sft_core.train.continuation import Continuation, resumable
from tests.train.tiny import Run, tiny_recipe


def checkpoint_of(folder: Path, strategy: str, num_ranks: int) -> Path:
    staged = folder / "staging" / "checkpoint-7"
    staged.mkdir(parents=True)
    zeros = [[[0.0], [0.0]]] * num_ranks
    Continuation(strategy, num_ranks, logged=5, losses=[0.0] * num_ranks, sums=zeros).write(staged)
    return publish(staged, folder / "checkpoints", keep=2)


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        (("ddp", 1), ("ddp", 1)),
        (("ddp", 1), ("ddp", 4)),
        (("ddp", 4), ("ddp", 3)),
        (("zero2", 2), ("zero2", 2)),
        (("zero3", 8), ("zero3", 8)),
        (("fsdp2", 2), ("fsdp2", 4)),
    ],
)
def test_resumable_in_the_way_it_was_written_is_the_checkpoint(
    written: tuple[str, int], asked: tuple[str, int], tmp_path: Path
) -> None:
    assert resumable(checkpoint_of(tmp_path, *written).parent, *asked) == tmp_path / "checkpoints" / "checkpoint-7"


@pytest.mark.parametrize(
    ("written", "asked", "told"),
    [
        (
            ("zero2", 2),
            ("zero2", 4),
            "runtime.num_processes: found 4 ranks, and checkpoint-7 was written under zero2 by 2 ranks; zero2 resumes "
            "only with that number. Continue with runtime.distributed: zero2 and 2 ranks "
            "(runtime.num_processes), or remove ",
        ),
        (("zero3", 2), ("zero3", 1), "runtime.num_processes: found 1 rank, and checkpoint-7 was written under zero3 "),
        (
            ("ddp", 1),
            ("zero2", 1),
            "runtime.distributed: found zero2, and checkpoint-7 was written under ddp by 1 rank; each saves the "
            "optimizer in another format. Continue with runtime.distributed: ddp, or remove ",
        ),
        (("zero2", 2), ("ddp", 2), "Continue with runtime.distributed: zero2 and 2 ranks (runtime.num_processes), or "),
        (("zero2", 2), ("zero3", 2), "runtime.distributed: found zero3, and checkpoint-7 was written under zero2 "),
        (("fsdp2", 2), ("ddp", 2), "Continue with runtime.distributed: fsdp2, or remove "),
        (("of_another_version", 2), ("ddp", 2), "Continue with runtime.distributed: of_another_version, or remove "),
    ],
)
def test_resumable_in_another_way_is_told_with_what_to_do(
    written: tuple[str, int], asked: tuple[str, int], told: str, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, *written)
    with pytest.raises(ValueError) as caught:
        resumable(checkpoint.parent, *asked)
    assert told in str(caught.value)
    assert str(caught.value).endswith(f"remove {checkpoint.parent} to train from the start")


def test_resumable_without_a_checkpoint_is_none(tmp_path: Path) -> None:
    assert resumable(tmp_path / "checkpoints", "zero2", 2) is None


@pytest.mark.slow
def test_train_checkpoint_of_ddp_under_zero_is_refused_before_training(train_here: Callable[..., Run]) -> None:
    first = train_here(tiny_recipe(training={"max_steps": 3}, runtime={"save_steps": 2}))
    events = first.events
    other = tiny_recipe(training={"max_steps": 3}, runtime={"save_steps": 2, "distributed": "zero2"})
    with pytest.raises(ValueError, match=r"found zero2, and checkpoint-3 was written under ddp by 1 rank"):
        train_here(other, out=first.folder)
    assert first.events == events


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_share_any_number_of_ranks_has_the_same_total(num_ranks: int) -> None:
    losses = [4.0, 8.0, 12.0, 16.0]  # each scaled by 4 ranks: their mean is the loss
    sums = [[[1.0 + rank, 2.0], [10.0 * rank, 3.0]] for rank in range(4)]
    written = Continuation("ddp", 4, logged=5, losses=losses, sums=sums)
    shares = [written.share(rank, num_ranks) for rank in range(num_ranks)]
    assert sum(loss for loss, _ in shares) / num_ranks == pytest.approx(10.0)
    totals = [[sum(own[of][i] for _, own in shares) for i in range(2)] for of in range(2)]
    assert totals == [[10.0, 8.0], [60.0, 12.0]]


def test_share_same_number_of_ranks_is_each_rank_s_own(tmp_path: Path) -> None:
    sums = [[[0.1, 0.2], [3.0, 4.0]], [[0.3, 0.7], [1.0, 2.0]]]
    Continuation("zero2", 2, logged=5, losses=[0.1, 1 / 3], sums=sums).write(tmp_path)
    written = Continuation.read(tmp_path)
    assert [written.share(rank, 2) for rank in range(2)] == [(0.1, sums[0]), (1 / 3, sums[1])]
