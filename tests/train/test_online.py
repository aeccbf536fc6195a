"""A step that is taken back leaves nothing behind."""

from types import SimpleNamespace

import pytest
import torch

from sft_core.train.online import step_gain


@pytest.mark.parametrize("steps_before", [0, 3])
def test_step_gain_leaves_weights_and_optimizer_bit_for_bit(steps_before: int):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    twin = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(16, 7)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.05, weight_decay=0.1) for one in (model, twin)]

    def loss(one: torch.nn.Module) -> torch.Tensor:
        return ((one(inputs) - 3.0) ** 2).mean()

    def train(one: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss(one).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(steps_before):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            train(one, optimizer)
    wrapped = SimpleNamespace(optimizer=optimizers[0])
    gain = step_gain(wrapped, lambda: loss(model), max_grad_norm=1.0)
    before = float(loss(twin))
    loss(twin).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    state = {name: value.clone() for name, value in twin.state_dict().items()}
    saved = optimizers[1].state_dict()
    saved = {**saved, "state": {k: {n: v.clone() for n, v in one.items()} for k, one in saved["state"].items()}}
    optimizers[1].step()
    assert gain == pytest.approx((before - float(loss(twin))) / before, rel=1e-5) and gain > 0
    twin.load_state_dict(state)
    optimizers[1].zero_grad()
    optimizers[1].load_state_dict(saved)
    for _ in range(2):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            train(one, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
