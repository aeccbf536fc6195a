import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from sft_core.train.schedule import EMPTY, step_packs

packs = st.integers(1, 60)
batch_sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32)


@given(packs, batch_sizes, st.integers(1, 4), seeds)
def test_epoch_any_size_holds_every_pack_once(num_packs: int, batch: int, num_epochs: int, seed: int) -> None:
    steps = step_packs(num_packs, global_batch_size=batch, num_epochs=num_epochs, max_steps=None, seed=seed)
    epochs = np.split(steps, num_epochs)
    assert len(epochs) == num_epochs
    for epoch in epochs:
        found = epoch[epoch != EMPTY]
        assert sorted(found) == list(range(num_packs))


@given(packs, batch_sizes, seeds)
def test_batch_last_of_an_epoch_is_smaller_not_filled(num_packs: int, batch: int, seed: int) -> None:
    assume(num_packs % batch)
    steps = step_packs(num_packs, global_batch_size=batch, num_epochs=1, max_steps=None, seed=seed)
    assert (steps[-1] == EMPTY).sum() == batch - num_packs % batch
    assert (steps[:-1] != EMPTY).all()


@given(packs, batch_sizes, st.integers(1, 30), st.integers(0, 30), seeds)
def test_schedule_longer_extends_the_shorter(num_packs: int, batch: int, short: int, more: int, seed: int) -> None:
    def of(num_steps: int) -> np.ndarray:
        return step_packs(num_packs, global_batch_size=batch, num_epochs=1, max_steps=num_steps, seed=seed)

    assert len(of(short)) == short
    assert (of(short + more)[:short] == of(short)).all()


@given(packs, batch_sizes, st.floats(0.01, 5), seeds)
def test_schedule_same_arguments_is_the_same(num_packs: int, batch: int, num_epochs: float, seed: int) -> None:
    first, second = (
        step_packs(num_packs, global_batch_size=batch, num_epochs=num_epochs, max_steps=None, seed=seed)
        for _ in range(2)
    )
    assert len(first) >= 1
    assert (first == second).all()


def test_schedule_other_seed_or_epoch_is_another_order() -> None:
    def of(seed: int) -> np.ndarray:
        return step_packs(50, global_batch_size=5, num_epochs=2, max_steps=None, seed=seed)

    first, second = np.split(of(0), 2)
    assert (first != second).any()
    assert (of(0) != of(1)).any()


def test_schedule_order_is_not_that_of_the_packs() -> None:
    # Packs are made longest first: in that order a model would see a curriculum.
    steps = step_packs(50, global_batch_size=1, num_epochs=1, max_steps=None, seed=0)
    assert steps.ravel().tolist() != list(range(50))


def test_max_steps_with_epochs_wins() -> None:
    def num_steps(num_epochs: float, max_steps: int | None) -> int:
        return len(step_packs(10, global_batch_size=4, num_epochs=num_epochs, max_steps=max_steps, seed=0))

    assert num_steps(2, None) == 6
    assert num_steps(2, 4) == 4
    assert num_steps(2, 20) == 20
    assert num_steps(0.5, None) == 2
    assert num_steps(0.01, None) == 1
