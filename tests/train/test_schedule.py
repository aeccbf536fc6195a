from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer

from sft_core.train.schedule import EMPTY, num_steps_of, order_coefficients, step_packs

packs = st.integers(1, 60)
batch_sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32)


def steps_of(num_packs: int, *, seed: int = 0, max_steps: int | None = None, **options: Any) -> np.ndarray:
    """The schedule of packs whose costs are distinct whole numbers in no order."""
    costs = np.random.default_rng(num_packs).permutation(num_packs).astype(float)
    return step_packs(costs, seed=seed, max_steps=max_steps, **options)


@given(packs, batch_sizes, st.integers(1, 4), seeds)
def test_epoch_any_size_holds_every_pack_once(num_packs: int, batch: int, num_epochs: int, seed: int) -> None:
    epochs = np.split(steps_of(num_packs, global_batch_size=batch, num_epochs=num_epochs, seed=seed), num_epochs)
    assert len(epochs) == num_epochs
    for epoch in epochs:
        found = epoch[epoch != EMPTY]
        assert sorted(found) == list(range(num_packs))


@given(packs, batch_sizes, seeds)
def test_batch_last_of_an_epoch_is_smaller_not_filled(num_packs: int, batch: int, seed: int) -> None:
    assume(num_packs % batch)
    steps = steps_of(num_packs, global_batch_size=batch, num_epochs=1, seed=seed)
    assert (steps[-1] == EMPTY).sum() == batch - num_packs % batch
    assert (steps[:-1] != EMPTY).all()


@given(packs, batch_sizes, st.integers(1, 30), st.integers(0, 30), seeds)
def test_schedule_longer_extends_the_shorter(num_packs: int, batch: int, short: int, more: int, seed: int) -> None:
    def of(num_steps: int) -> np.ndarray:
        return steps_of(num_packs, global_batch_size=batch, num_epochs=1, max_steps=num_steps, seed=seed)

    assert len(of(short)) == short
    assert (of(short + more)[:short] == of(short)).all()


@given(packs, batch_sizes, st.floats(0.01, 5), seeds)
def test_schedule_same_arguments_is_the_same(num_packs: int, batch: int, num_epochs: float, seed: int) -> None:
    first, second = (steps_of(num_packs, global_batch_size=batch, num_epochs=num_epochs, seed=seed) for _ in range(2))
    assert len(first) >= 1
    assert (first == second).all()


def test_schedule_other_seed_or_epoch_is_another_order() -> None:
    first, second = np.split(steps_of(50, global_batch_size=5, num_epochs=2), 2)
    assert (first != second).any()
    assert (first != steps_of(50, global_batch_size=5, num_epochs=1, seed=1)).any()
    batches, others = ({frozenset(batch) for batch in epoch.tolist()} for epoch in (first, second))
    assert len(batches) == 10
    assert len(batches & others) < 10, "the same batches in another order"


def test_schedule_order_is_not_that_of_the_packs() -> None:
    # Packs are made longest first: in that order a model would see a curriculum.
    steps = steps_of(50, global_batch_size=1, num_epochs=1)
    assert steps.ravel().tolist() != list(range(50))


def test_batch_holds_packs_of_like_cost() -> None:
    costs = np.random.default_rng(0).permutation(400).astype(float)
    steps = step_packs(costs, global_batch_size=10, num_epochs=1, max_steps=None, seed=0)
    # A batch of 10 out of 400 would span some 330 at random.
    assert np.ptp(costs[steps], axis=1).mean() < 60


def test_max_steps_with_epochs_wins() -> None:
    def num_steps(num_epochs: float, max_steps: int | None) -> int:
        return len(steps_of(10, global_batch_size=4, num_epochs=num_epochs, max_steps=max_steps))

    assert num_steps(2, None) == 6
    assert num_steps(2, 4) == 4
    assert num_steps(2, 20) == 20
    assert num_steps(0.5, None) == 2
    assert num_steps(0.01, None) == 1


@given(num_packs=st.integers(1, 60), batch=st.integers(1, 8), num_epochs=st.floats(0.01, 4))
def test_broken_epochs_have_the_steps_of_the_trainer(num_packs: int, batch: int, num_epochs: float) -> None:
    class Asked(Trainer):
        def __init__(self) -> None:
            pass

        def get_total_train_batch_size(self, args: object) -> int:
            return batch

        def get_sp_size(self) -> int:
            return 1

    arguments = SimpleNamespace(max_steps=-1, num_train_epochs=num_epochs, gradient_accumulation_steps=batch)
    *_, expected = Asked().set_initial_training_values(arguments, DataLoader(range(num_packs)))  # type: ignore[arg-type]
    assert num_steps_of(num_packs, batch, num_epochs, None) == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_ranks_get_the_slots_that_balance_counts_on(num_ranks: int) -> None:
    # What accelerate hands out, rank by rank, of the schedule as the trainer reads it: one slot a micro-batch.
    schedule = steps_of(30, global_batch_size=8, num_epochs=1)
    slots = schedule.ravel()
    for rank in range(num_ranks):
        sampler = BatchSampler(SequentialSampler(slots), batch_size=1, drop_last=False)
        found = [slots[batch[0]] for batch in BatchSamplerShard(sampler, num_ranks, rank)]
        accumulation = 8 // num_ranks
        expected = [step[j * num_ranks + rank] for step in schedule for j in range(accumulation)]
        assert found == expected, f"{rank=}"


# What a token and a square of a length weigh


def model_of(model_type: str, **config: Any) -> PreTrainedModel:
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**small, **config}))


LLAMA = {"intermediate_size": 64, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("model_type", "config", "num_layers", "width"),
    [
        ("llama", LLAMA, 4, 32),
        ("qwen3", {**LLAMA, "head_dim": 24}, 4, 48),  # its heads are wider than the model
        ("gpt2", {"n_positions": 64}, 4, 32),
        (
            "gemma3_text",
            {**LLAMA, "head_dim": 16, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
            1,
            32,
        ),
        ("mamba", {"state_size": 4, "num_attention_heads": None}, 0, 0),
    ],
)
def test_order_coefficients_are_of_all_parameters(model_type: str, config: dict, num_layers: int, width: int) -> None:
    model = model_of(model_type, **config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters > 10_000
    assert order_coefficients(model) == (6 * num_parameters, 6 * num_layers * width)


def test_order_coefficients_of_an_8b_model() -> None:
    class Eight:
        config = AutoConfig.for_model("llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)

        def num_parameters(self) -> int:
            return 8_000_000_000

    linear, quadratic = order_coefficients(Eight())
    # At 65,536 tokens in one document attention is about half of all.
    assert linear == 6 * 8e9
    assert 65_536 * quadratic / linear == pytest.approx(1.07, abs=0.01)
