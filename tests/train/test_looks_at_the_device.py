"""No micro-batch makes the host wait for the device: counted on a CPU, by the operations that hand a value over."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sft_core.train import tried_forward
from sft_core.train.arguments import gpu_arguments
from sft_core.train.loss import LossBySource
from sft_core.train.trainer import PackTrainer
from tests.train.test_loss import random_documents
from tests.train.tiny import Run, tiny_recipe

# What needs a tensor's values to go on: each waits for the device on a GPU.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique2", "_unique2", "item")


class Looks(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in WAITS or (name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Looks]:
    """What each micro-batch after the first (which tries the model) looked at, counting the batch's own count."""
    seen: list[Looks] = []
    for name in ("training_step", "get_batch_samples"):
        step = getattr(PackTrainer, name)

        def watched(self: Any, *args: Any, step: Callable[..., Any] = step, **kwargs: Any) -> Any:
            with Looks() as mode:
                found = step(self, *args, **kwargs)
            seen.append(mode)
            return found

        monkeypatch.setattr(PackTrainer, name, watched)
    return seen


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_micro_batch_waits_for_the_device(
    fused: bool,
    checkpointing: bool,
    looks: list[Looks],
    train_here: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tried_forward, "wants_fused_head", lambda device: fused)
    training = {"gradient_checkpointing": checkpointing, "max_steps": 3}
    run = train_here(tiny_recipe(model={"attn_implementation": "varlen"}, training=training))
    assert len(run.events) == 3 and len(looks) == 3 * (4 + 1)
    later = [mode.found for mode in looks[2:]]  # the first micro-batch tries the model
    assert sum(found.total() for found in later) == 0, later


def test_a_look_is_seen(looks: list[Looks], train_here: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    add = LossBySource.add

    def looking(self: Any, nll_N: torch.Tensor, source_N: torch.Tensor) -> None:
        assert float(nll_N.sum()) >= 0
        add(self, nll_N, source_N)

    monkeypatch.setattr(LossBySource, "add", looking)
    train_here(tiny_recipe(model={"attn_implementation": "varlen"}, training={"max_steps": 1}))
    assert [mode.found["_local_scalar_dense"] for mode in looks[2:]] == [1, 1, 1]


def test_mask_of_all_pairs_looks_once_a_forward() -> None:
    """transformers asks whether a batch holds several documents; attention that knows them is not asked."""
    from sft_core.train.collate import collate
    from sft_core.train.loss import Forward, trained_token_nll
    from tests.train.test_loss import tiny_model

    batch = collate(random_documents(20, 30))
    for attention, told_by, waits in (("sdpa", "positions", 1), ("varlen", "bounds", 0)):
        with Looks() as mode:
            trained_token_nll(tiny_model("llama", attention), batch, Forward(told_by))
        assert mode.found.total() == waits, attention


def test_gpu_arguments_overlap_copies_and_loading_with_the_work() -> None:
    found = gpu_arguments((9, 0))
    assert found["accelerator_config"] == {"non_blocking": True} and found["dataloader_num_workers"] == 1
    assert (found["tf32"], gpu_arguments((7, 5))["tf32"]) == (True, False)
