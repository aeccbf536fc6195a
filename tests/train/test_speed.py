"""FLOPs of a batch: by its documents."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.balance import pack_costs
from sft_core.data.shards import TokenRow
from sft_core.train.collate import collate
from sft_core.train.speed import batch_flops, peak_flops_per_s


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_batch_flops_are_what_the_schedule_balances(lengths: list[int]) -> None:
    rows = [(TokenRow(np.ones(n, np.int32), np.ones(n, np.uint8)), 0) for n in lengths]
    found = batch_flops(collate(rows)["position_ids"], 7.0, 0.5)
    assert found == sum(7.0 * n + 0.5 * n * n for n in lengths)
    (cost,) = pack_costs(np.array(lengths), np.array([0, len(lengths)]), linear=7.0, quadratic=0.5)
    assert found == pytest.approx(cost)


def test_cpu_has_no_known_peak() -> None:
    assert peak_flops_per_s(torch.device("cpu")) is None
