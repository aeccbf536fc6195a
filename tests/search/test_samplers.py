"""What is drawn while training goes on, from measurements that a test writes down."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.packing.plan import PackPlan
from sft_core.recipe.search.section import Search
from sft_core.search.registry import make_sampler
from sft_core.search.strategies.dynamix import Dynamix
from sft_core.search.strategies.ies import Ies
from sft_core.search.strategy import SamplerInput
from sft_core.train.hooks import Block

TASKS = ["a", "b", "c"]


def plan(*tasks: tuple[int, int]) -> tuple[PackPlan, np.ndarray]:
    """Of each task so many packs of two documents, each of so many tokens."""
    num_tokens = np.concatenate([np.full(2 * packs, tokens) for packs, tokens in tasks])
    task = np.concatenate([np.full(2 * packs, number) for number, (packs, _) in enumerate(tasks)])
    row = np.arange(len(task))
    return PackPlan(task.astype(np.int16), row, num_tokens, np.arange(0, len(task) + 1, 2)), task


def dynamix(num_steps: int = 40, seed: int = 0, every_steps: int = 10) -> Dynamix:
    packs, task = plan((4, 10), (8, 10), (4, 10))
    return Dynamix(TASKS, task, packs, num_steps, global_batch_size=2, seed=seed, every_steps=every_steps)


def blocks(sampler: Dynamix | Ies, measured: list[np.ndarray]) -> list[Block]:
    found = []
    for values in measured:
        if (block := sampler.next_block()) is None:
            break
        found.append(block)
        sampler.probes()
        sampler.learn(values)
    return found


def as_lists(found: list[Block]) -> list[list[list[list[int]]]]:
    return [[[pack.tolist() for pack in batch] for batch in block] for block in found]


def test_dynamix_begins_with_the_sizes_and_a_uniform_share():
    assert dynamix().shares() == pytest.approx({"a": 0.7 * 0.25 + 0.1, "b": 0.7 * 0.5 + 0.1, "c": 0.7 * 0.25 + 0.1})


def test_dynamix_draws_more_of_who_gains_and_never_less_than_the_uniform_share():
    sampler = dynamix()
    for _ in range(60):
        sampler.learn(np.array([0.3, 0.01, 0.02]))
    shares = sampler.shares()
    assert shares["a"] > 0.75 and min(shares.values()) >= 0.1
    assert sum(shares.values()) == pytest.approx(1)
    # Q tends to the rewards, which are 1, 0 and 1/29: softmax(5 * Q + log p0).
    weights = np.array([0.25, 0.5, 0.25]) * np.exp(5 * (1 - 0.95**60) * np.array([1, 0, 0.01 / 0.29]))
    assert shares["a"] == pytest.approx(0.7 * weights[0] / weights.sum() + 0.1)


def test_dynamix_learns_nothing_from_gains_that_are_all_alike():
    sampler = dynamix()
    before = sampler.shares()
    sampler.learn(np.array([0.2, 0.2, 0.2]))
    assert sampler.shares() == before


@given(st.integers(0, 50), st.integers(1, 40), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_dynamix_draws_the_same_of_the_same_and_as_many_steps_as_there_are(seed: int, num_steps: int, gains: list):
    measured = [np.array(gains)] * 50
    found = blocks(dynamix(num_steps, seed), measured)
    assert as_lists(found) == as_lists(blocks(dynamix(num_steps, seed), measured))
    assert sum(map(len, found)) == num_steps
    assert all(len(batch) == 2 for block in found for batch in block)


def test_dynamix_takes_each_pack_of_a_task_once_before_any_comes_again():
    found = blocks(dynamix(200), [np.array([0.1, 0.1, 0.1])] * 20)
    packs = [pack.tolist() for block in found for batch in block for pack in batch]
    _, task = plan((4, 10), (8, 10), (4, 10))
    for number, size in enumerate((4, 8, 4)):
        drawn = [pack[0] for pack in packs if task[pack[0]] == number]
        assert len(drawn) > 3 * size
        for first in range(0, len(drawn) - size, size):
            assert len({*drawn[first : first + size]}) == size
    assert all(second == first + 1 for first, second in packs), "packs are whole"


def test_dynamix_probes_one_pack_of_each_task():
    _, task = plan((4, 10), (8, 10), (4, 10))
    assert [{*task[pack].tolist()} for pack in dynamix().probes()] == [{0}, {1}, {2}]


def ies(num_epochs: float = 9.0, delta: float = 0.1, max_length: int | None = 25) -> Ies:
    packs, task = plan((4, 10), (8, 10), (4, 10))
    return Ies(TASKS, task, packs, num_epochs, global_batch_size=2, seed=0, max_length=max_length, delta=delta)


def documents(block: Block) -> list[int]:
    return sorted(document for batch in block for pack in batch for document in pack.tolist())


def test_ies_leaves_a_row_out_while_its_loss_hardly_bends_and_takes_it_back():
    bending = np.zeros(32)
    bending[5] = 1.0
    bent = [bending * value for value in (0.0, 0.3, 0.0, 0.0, 0.0, 0.5)]  # row 5: |d| = 0.6, 0.3, 0, 0.5
    steep = [np.where(bending == 1, row, epoch**2.0) for epoch, row in enumerate(bent)]  # all others: |d| = 2
    found = blocks(ies(), [*steep, steep[0]])
    rows = [documents(block) for block in found]
    assert [len(of_epoch) for of_epoch in rows[:5]] == [32, 32, 32, 32, 32]
    assert 5 not in rows[5] and len(rows[5]) == 31
    assert rows[6] == list(range(32)), "it bends again"


@given(
    st.lists(st.booleans(), min_size=32, max_size=32),
    st.lists(st.integers(1, 20), min_size=32, max_size=32),
    st.sampled_from([40, 64, None]),
)
def test_ies_packs_those_that_stay_once_each_within_the_length(
    stays: list[bool], lengths: list[int], max_length: int | None
):
    sampler = ies(max_length=max_length)
    sampler.plan = dataclasses.replace(sampler.plan, num_tokens=np.array(lengths))
    losses = [np.where(stays, float(epoch**2), 1.0) for epoch in range(3)]
    blocks(sampler, losses)
    block = sampler.next_block()
    if not any(stays):
        assert block is None, "nothing is left to train"
        return
    assert block is not None and documents(block) == np.flatnonzero(stays).tolist()
    packs = [pack for batch in block for pack in batch]
    if max_length is None and not all(stays):
        assert all(len(pack) == 1 for pack in packs)
    assert all(sampler.plan.num_tokens[pack].sum() <= (max_length or 40) for pack in packs)
    assert [len(batch) for batch in block[:-1]] == [2] * (len(block) - 1)


def test_ies_trains_a_part_of_the_last_epoch():
    found = blocks(ies(num_epochs=1.5), [np.zeros(32)] * 5)
    assert [len(block) for block in found] == [8, 4]


def test_ies_goes_through_each_epoch_in_another_order():
    first, second = blocks(ies(), [np.zeros(32)] * 2)
    orders = [[pack[0] for pack in itertools.chain(*block)] for block in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_ies_tells_the_share_of_each_tasks_rows_that_stays():
    sampler = ies()
    stays = np.arange(32) >= 12  # of a none, of b four left out
    for epoch in range(3):
        sampler.learn(np.where(stays, float(epoch**2), 1.0))
    assert sampler.shares() == {"a": 0.0, "b": 0.75, "c": 1.0}


def test_samplers_are_those_of_two_strategies():
    packs, task = plan((1, 10), (1, 10), (1, 10))
    amounts = {"num_steps": 3, "num_epochs": 1.0, "global_batch_size": 1, "max_length": 20, "seed": 0}
    settings = {"dynamix": {"gamma": 1.0}, "ies": {"delta": 0.5}}
    samplers = {
        name: make_sampler(
            SamplerInput(
                Search.model_validate({"strategy": name, **({name: settings[name]} if name in settings else {})}),
                tasks=TASKS,
                task=task,
                plan=packs,
                **amounts,
            )
        )
        for name in ("sft", "msft", "dynamix", "ies")
    }
    assert samplers["sft"] is None and samplers["msft"] is None
    assert isinstance(samplers["dynamix"], Dynamix) and samplers["dynamix"].gamma == 1.0
    assert isinstance(samplers["ies"], Ies) and samplers["ies"].delta == 0.5
