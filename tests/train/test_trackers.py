"""What the log tells reaches a tracker; one that is not there is told before any work."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_core.recipe.parse import parse_recipe
from sft_core.train import speed_log
from sft_core.train.arguments import check_report_to
from steps.start import prepare
from tests.train.tiny import Run, tiny_recipe


@pytest.mark.parametrize(
    ("tracker", "told"),
    [
        ("wandbb", "found 'wandbb', which is no tracker of the Trainer's; did you mean 'wandb'?"),
        ("paper", "found 'paper', which is no tracker of the Trainer's; known: azure_ml, clearml, codecarbon"),
    ],
)
def test_tracker_unknown_is_told_with_those_that_are_known(tracker: str, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_report_to([tracker])
    assert str(caught.value).startswith(f"runtime.report_to: {told}")


@pytest.mark.parametrize("trackers", [[], ["none"], ["all"]])
def test_tracker_none_and_all_are_fine(trackers: list[str]) -> None:
    check_report_to(trackers)


@pytest.mark.skipif(importlib.util.find_spec("swanlab") is not None, reason="the tracker is installed")
def test_tracker_not_installed_is_told_before_any_work(tmp_path: Path) -> None:
    data = tiny_recipe(runtime={"report_to": ["swanlab"], "store": str(tmp_path / "store")})
    with pytest.raises(ValueError, match=r"^runtime.report_to: swanlab cannot be used here: .*`pip install swanlab`"):
        prepare(parse_recipe(data))
    assert not list((tmp_path / "store").glob("*/*")), "nothing was made"


def test_tensorboard_gets_what_is_logged(
    train_here: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    monkeypatch.setattr(speed_log, "peak_flops_per_s", lambda device: 1e12)  # of a CPU nobody tells
    run = train_here(tiny_recipe(runtime={"report_to": ["tensorboard"]}))
    written = EventAccumulator(str(tmp_path)).Reload()
    expected: dict[str, list[tuple[int, Any]]] = {}
    for event in run.events:
        for name, value in event.items():
            if name not in ("step", "of"):
                expected.setdefault(f"train/{name}", []).append((event["step"], value))
    wanted = ("loss", "loss/copy_no_think", "loss/checksum_think", "grad_norm", "tokens_per_s", "mfu", "memory_gib")
    assert {f"train/{name}" for name in wanted} <= expected.keys()
    for name, values in expected.items():
        found = written.Scalars(name)[: len(values)]  # the Trainer adds a line on the whole run, with its epoch
        assert [scalar.step for scalar in found] == [step for step, _ in values]
        assert [scalar.value for scalar in found] == pytest.approx([value for _, value in values], rel=1e-6)
