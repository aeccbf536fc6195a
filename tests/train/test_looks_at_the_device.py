"""At most two looks at the device an optimizer step: each makes the host wait for it. Counted on a CPU."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from sft_core.train import tried_forward
from sft_core.train.arguments import gpu_arguments
from sft_core.train.loss import LossBySource
from sft_core.train.models import attention
from sft_core.train.trainer import PackTrainer
from tests.train.test_loss import random_documents
from tests.train.tiny import Run, tiny_recipe

# Operations that need a tensor's values to go on: each waits for the device on a GPU.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique", "_unique2", "unique_dim")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")  # which count the places of a mask
METHODS = ("tolist", "numpy", "cpu")  # of a tensor on the CPU these are no operations, so they are patched
MOST_A_STEP = 2
BY_DOCUMENT = attention._by_document


class Looks(TorchDispatchMode):
    """Counts what would make the host wait if every tensor were on a GPU. `paused`: nothing is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.paused = False
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Looks":
        for name in METHODS:
            self._patch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        by_mask = name in INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1])
        # Without the size of its result it sums the repeats first.
        by_repeats = function is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if name in WAITS or by_mask or by_repeats:
            self._count(name)
        return function(*args, **kwargs)

    def kernel(self, *args: Any) -> torch.Tensor:
        """varlen attention of a CPU in the place of a GPU's kernel, which reads the documents' bounds itself."""
        self.paused = True
        try:
            return BY_DOCUMENT(*args)
        finally:
            self.paused = False

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._count(name)
            return method(tensor, *args, **kwargs)

        return counted

    def _count(self, name: str) -> None:
        self.counts[name] += not self.paused


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """The looks of each step that is over: all that happens between two ends of a step, loading and clipping too."""
    steps: list[Counter[str]] = []
    train = PackTrainer.train

    def watched(self: PackTrainer, *args: Any, **kwargs: Any) -> Any:
        with Looks() as mode:

            class CountSteps(TrainerCallback):
                def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                    steps.append(+mode.counts)
                    mode.counts.clear()

            monkeypatch.setattr(attention, "_by_document", mode.kernel)
            self.add_callback(CountSteps())
            return train(self, *args, **kwargs)

    monkeypatch.setattr(PackTrainer, "train", watched)
    return steps


def looks_a_step(looks: list[Counter[str]]) -> list[Counter[str]]:
    """Without the first step, in which the model is tried, and the second, at whose begin the first one is logged."""
    assert len(looks) == 5
    return looks[2:]


def five_steps(**training: Any) -> dict[str, Any]:
    training = {"max_steps": 5, "max_grad_norm": 0.1, **training}
    return tiny_recipe(model={"attn_implementation": "varlen"}, training=training, runtime={"logging_steps": 100})


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_looks_at_most_twice_at_the_device(
    fused: bool,
    checkpointing: bool,
    looks: list[Counter[str]],
    train_here: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tried_forward, "wants_fused_head", lambda device: fused)
    train_here(five_steps(gradient_checkpointing=checkpointing))
    assert max(counts.total() for counts in looks_a_step(looks)) <= MOST_A_STEP, looks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "method", "times"),
    [(LossBySource, "add", 4), (Accelerator, "clip_grad_norm_", 1), (torch.optim.AdamW, "step", 1)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_look_anywhere_in_a_step_is_counted(
    place: type,
    method: str,
    times: int,
    looks: list[Counter[str]],
    train_here: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_here(five_steps())
    before = looks_a_step([*looks])
    looks.clear()
    plain = getattr(place, method)

    def looking(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert torch.ones(1).item()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(place, method, looking)
    train_here(five_steps())
    after = looks_a_step(looks)
    assert [more.total() - less.total() for more, less in zip(after, before, strict=True)] == [times] * 3


VALUES, MASK = torch.arange(3.0), torch.tensor([True, False, True])
KINDS: dict[str, Callable[[], Any]] = {
    "item": lambda: VALUES.sum().item(),
    "float": lambda: float(VALUES[0]),
    "bool": lambda: bool(MASK.any()),
    "tolist": lambda: VALUES.tolist(),
    "numpy": lambda: VALUES.numpy(),
    "cpu": lambda: VALUES.cpu(),
    "read by a mask": lambda: VALUES[MASK],
    "written by a mask": lambda: VALUES.clone().__setitem__(MASK, 1.0),
    "nonzero": lambda: MASK.nonzero(),
    "masked_select": lambda: VALUES.masked_select(MASK),
    "repeats": lambda: VALUES.repeat_interleave(torch.tensor([1, 2, 0])),
    "unique": lambda: VALUES.unique(),
    "equal": lambda: torch.equal(VALUES, VALUES),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_look_is_counted(kind: str) -> None:
    with Looks() as mode:
        KINDS[kind]()
    assert mode.counts.total() == 1, mode.counts


def test_what_needs_no_value_is_no_look() -> None:
    with Looks() as mode:
        VALUES.repeat_interleave(torch.tensor([1, 2, 0]), output_size=3)
        VALUES.repeat_interleave(2)
        VALUES[torch.tensor([0, 2])]
        VALUES.masked_fill(MASK, 1.0)
        torch.where(MASK, VALUES, 0.0)
    assert not mode.counts


def test_mask_of_all_pairs_looks_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks whether a batch holds several documents; attention that knows them is not asked."""
    from sft_core.train.collate import collate
    from sft_core.train.loss import Forward, trained_token_nll
    from tests.train.test_loss import tiny_model

    batch = collate(random_documents(20, 30))
    for name, document_inputs, waits in (("sdpa", "positions", 1), ("varlen", "bounds", 0)):
        with Looks() as mode:
            monkeypatch.setattr(attention, "_by_document", mode.kernel)
            trained_token_nll(tiny_model("llama", name), batch, Forward(document_inputs))
        assert mode.counts.total() == waits, name


def test_gpu_arguments_overlap_copies_and_loading_with_the_work() -> None:
    found = gpu_arguments((9, 0))
    assert found["accelerator_config"] == {"non_blocking": True} and found["dataloader_num_workers"] == 1
    assert (found["tf32"], gpu_arguments((7, 5))["tf32"]) == (True, False)
