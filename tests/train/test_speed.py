"""FLOPs of a batch, by its documents; what devices can do at most; the speed that the log tells."""

import logging
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.shards.token_shards import TokenRow
from sft_core.train import speed_log
from sft_core.train.collate import collate
from sft_core.train.flops import Flops
from sft_core.train.speed import batch_flops, peak_flops_per_s, peak_of
from sft_core.train.speed_log import SpeedLog

ROW = TokenRow(np.ones(8, np.int32), np.ones(8, np.uint8))


@given(lengths=st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=8))
def test_batch_flops_are_those_of_its_documents(lengths: list[tuple[int, bool]]) -> None:
    rows = [(TokenRow(np.ones(n, np.int32), np.full(n, is_trained, np.uint8)), 0) for n, is_trained in lengths]
    num_trained = sum(n - 1 for n, is_trained in lengths if is_trained)
    found = batch_flops(Flops(7.0, 0.5, 100.0), collate(rows))
    assert found == sum(7.0 * n + 0.5 * n * n for n, _ in lengths) + 100.0 * num_trained


def test_cpu_has_no_known_peak() -> None:
    assert peak_flops_per_s(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 503.8),
        ("NVIDIA H20", 148),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("AMD Instinct MI300X", 1307),
        ("AMD Instinct MI325X", 1307),
        ("AMD Instinct MI355X", 2517),
    ],
)
def test_peak_is_that_of_the_longest_name_that_matches(name: str, teraflops: float) -> None:
    assert peak_of(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    ],
)
def test_peak_of_another_device_is_unknown_and_told_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sft_core.train.speed"):
        assert peak_of(name) is None
        assert peak_of(name) is None
    assert caplog.messages == [f"no peak FLOP/s is known of {name}: FLOP/s are logged, MFU is not"]


@pytest.fixture
def log() -> Iterator[SpeedLog]:
    """Of a rank that is alone, whatever training this process did before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield SpeedLog(Flops(7.0, 0.5, 100.0), Accelerator(cpu=True))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_speed_log_counts_since_the_last_line_and_leaves_evaluation_out(log: SpeedLog) -> None:
    batch = collate([(ROW, 0)], [(ROW, 0)])
    for _ in range(3):
        log.count(batch)
    time.sleep(0.3)
    line = log.line(evaluation_s=0.2)
    assert 0.3 <= line["seconds"] < 5 and 0.05 < line["memory_gib"] < 64 and "mfu" not in line
    training_s = line["seconds"] - 0.2
    assert line["tokens_per_s"] * training_s == pytest.approx(3 * 16, rel=0.01)
    assert line["trained_tokens_per_s"] * training_s == pytest.approx(3 * 14, rel=0.01)
    assert line["tflops_per_s"] * 1e12 * training_s == pytest.approx(3 * (7 * 16 + 0.5 * 128 + 100 * 14), rel=0.01)
    log.count(batch)
    time.sleep(0.1)
    line = log.line(evaluation_s=0.0)
    assert line["seconds"] < 5 and line["tokens_per_s"] * line["seconds"] == pytest.approx(16, rel=0.02)


def test_speed_log_tells_mfu_where_the_peak_is_known(log: SpeedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_log, "peak_flops_per_s", lambda device: 1e4)  # of a CPU nobody tells
    log.count(collate([(ROW, 0)]))
    time.sleep(0.1)
    line = log.line(evaluation_s=0.0)
    assert line["mfu"] == pytest.approx(line["tflops_per_s"] * 1e12 / 1e4, rel=0.01) and line["mfu"] > 0
