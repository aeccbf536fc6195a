"""Balance: every pack once an epoch, in random order, packs of like cost in the same global batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.packing import reasoning_lengths
from sft_core.data.packing.balance import grouped_order, pack_costs
from sft_core.data.packing.plan import first_fit_decreasing

GROUP = 128
LINEAR, QUADRATIC = 6 * 8e9, 6 * 32 * 4096  # of an 8 B model


@pytest.fixture(scope="module")
def costs() -> np.ndarray:
    """Costs of the packs of 300 k rows, longest first as they are made: float64, shape (packs,)."""
    lengths = reasoning_lengths(300_000, 65_536, seed=0)
    pack = first_fit_decreasing(lengths, 65_536)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pack))])
    return pack_costs(lengths[np.argsort(pack, kind="stable")], offsets, linear=LINEAR, quadratic=QUADRATIC)


def order_of(costs: np.ndarray, group_size: int, seed: int = 0, **options: int) -> np.ndarray:
    return grouped_order(costs, group_size, np.random.default_rng(seed), **options)


def batches_of(costs: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Costs by global batch: shape (steps, GROUP), the last, smaller batch left out."""
    num_steps = len(order) // GROUP
    assert num_steps > 100
    return costs[order[: num_steps * GROUP]].reshape(num_steps, GROUP)


def slowest_over_mean(costs_SG: np.ndarray, num_ranks: int) -> float:
    """Mean over steps of the slowest rank's cost over the mean one's: rank r has the slots j * ranks + r."""
    of_ranks = costs_SG.reshape(len(costs_SG), -1, num_ranks).sum(axis=1)
    return float((of_ranks.max(axis=1) / of_ranks.mean(axis=1)).mean())


# Costs


@given(st.lists(st.lists(st.integers(1, 100_000), min_size=1, max_size=6), min_size=1, max_size=20))
def test_pack_costs_are_those_of_the_definition(packs: list[list[int]]):
    num_tokens = np.array([length for pack in packs for length in pack], dtype=np.int32)
    offsets = np.cumsum([0, *(len(pack) for pack in packs)])
    found = pack_costs(num_tokens, offsets, linear=7.0, quadratic=0.5)
    assert found.dtype == np.float64
    assert found.tolist() == [7.0 * sum(pack) + 0.5 * sum(length**2 for length in pack) for pack in packs]


def test_pack_costs_one_long_document_costs_more_than_many_short():
    found = pack_costs(np.array([60_000, *[1000] * 60], np.int32), np.array([0, 1, 61]), linear=6e9, quadratic=1e6)
    assert found[0] > 3 * found[1]


# The order


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**32))
def test_order_of_any_size_holds_every_pack_once(num_packs: int, group_size: int, window: int, seed: int):
    costs = np.random.default_rng(seed).integers(1, 50, num_packs).astype(float)
    order = order_of(costs, group_size, seed, window=window)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_packs))


def test_order_is_a_function_of_costs_and_seed(costs: np.ndarray):
    first = order_of(costs, GROUP)
    assert (order_of(costs, GROUP) == first).all()
    other = order_of(costs, GROUP, seed=1)
    assert (other == first).mean() < 0.01


@given(st.integers(1, 300), st.integers(0, 2**32))
def test_order_groups_of_one_is_the_plain_permutation(num_packs: int, seed: int):
    plain = np.random.default_rng(seed).permutation(num_packs)
    assert (order_of(np.arange(num_packs, dtype=float), 1, seed) == plain).all()


@given(st.integers(2, 9), st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32))
def test_order_each_window_is_cut_by_cost(group_size: int, num_groups: int, window: int, seed: int):
    # Distinct costs: the groups of a window are exactly the cuts of its sorted packs.
    costs = np.random.default_rng(seed).permutation(num_groups * group_size).astype(float)
    groups = np.sort(costs[order_of(costs, group_size, seed, window=window)].reshape(num_groups, group_size))
    num_windows = max(min(2, num_groups), round(num_groups / window))
    for found in np.array_split(groups, num_windows):
        assert sorted(found.tolist()) == np.sort(found, axis=None).reshape(found.shape).tolist()


@pytest.mark.parametrize("num_groups", [2, 3, 10, 24, 100])
def test_order_another_epoch_has_other_batches(num_groups: int):
    # A few groups, all in one window, would be the same ones at every epoch.
    costs = np.arange(num_groups * 8, dtype=float)
    first, second = (
        {frozenset(group) for group in order_of(costs, 8, seed).reshape(num_groups, 8).tolist()} for seed in (0, 1)
    )
    assert len(first) == num_groups
    assert len(first & second) < max(1, num_groups / 10)


@pytest.mark.slow
@given(st.integers(2, 9), st.data())
def test_order_packs_that_fill_no_group_are_any(group_size: int, data: st.DataObject):
    rest = data.draw(st.integers(1, group_size - 1))
    # The cheapest are as likely there as any: they must not gather in the last batch.
    costs = np.arange(3 * group_size + rest, dtype=float)
    last = {pack for seed in range(200) for pack in order_of(costs, group_size, seed)[-rest:].tolist()}
    assert len(last) > rest * 2


@pytest.mark.parametrize(("num_ranks", "bound"), [(2, 1.002), (8, 1.002), (32, 1.01), (64, 1.015)])
def test_ranks_any_number_of_them_take_equally_long(costs: np.ndarray, num_ranks: int, bound: float):
    # One order, made without knowing the ranks, serves them all.
    plain = batches_of(costs, np.random.default_rng(0).permutation(len(costs)))
    found = slowest_over_mean(batches_of(costs, order_of(costs, GROUP)), num_ranks)
    assert found < bound
    assert slowest_over_mean(plain, num_ranks) - 1 > 5 * (found - 1), "these packs would be even by themselves"


@pytest.mark.parametrize("num_ranks", [8, 64])
def test_ranks_within_each_micro_step_take_equally_long(costs: np.ndarray, num_ranks: int):
    # FSDP and ZeRO-3 wait for the slowest at every micro-step.
    micro_steps = batches_of(costs, order_of(costs, GROUP)).reshape(-1, num_ranks)
    assert float(np.mean(micro_steps.max(axis=1) / micro_steps.mean(axis=1))) < 1.03


@pytest.mark.parametrize(("group_size", "num_ranks"), [(24, 8), (12, 4), (120, 40)])
def test_ranks_of_an_odd_accumulation_come_to_nearly_the_same_sum(group_size: int, num_ranks: int):
    # Costs 0 to G - 1: in sorted order, the last rank's sum would be micro-steps * (ranks - 1) above the first's.
    slots = order_of(np.arange(group_size, dtype=float), group_size).reshape(-1, num_ranks)
    assert len(slots) % 2 == 1
    assert np.ptp(slots.sum(axis=0)) < num_ranks


@pytest.mark.parametrize(("group_size", "num_ranks"), [(128, 64), (128, 8), (16, 8), (96, 48)])
def test_ranks_of_an_even_accumulation_come_to_the_same_sum(group_size: int, num_ranks: int):
    slots = order_of(np.arange(group_size, dtype=float), group_size).reshape(-1, num_ranks)
    assert np.ptp(slots.sum(axis=0)) == 0


def test_ranks_none_gets_the_heaviest_pack_more_often(costs: np.ndarray):
    heaviest = batches_of(costs, order_of(costs, GROUP)).argmax(axis=1) % 8
    expected = len(heaviest) / 8
    assert np.abs(np.bincount(heaviest, minlength=8) - expected).max() < 4 * expected**0.5


@pytest.mark.parametrize("seed", range(3))
def test_epoch_has_no_curriculum(costs: np.ndarray, seed: int):
    batches = batches_of(costs, order_of(costs, GROUP, seed)).mean(axis=1)
    ranks = batches.argsort().argsort()
    assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.2
    # Nor within a window: its heaviest batch may stand anywhere.
    heaviest = [window.argmax() / len(window) for window in np.array_split(batches, round(len(batches) / 16))]
    assert len(heaviest) > 8
    assert len(set(heaviest)) > len(heaviest) / 3
