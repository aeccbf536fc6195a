"""What installs the project, beside what runs it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_constraints_leave_to_torch_what_its_builds_disagree_on():
    pinned = {re.split("[=<>@ ]", line)[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if line}
    assert "torch" in pinned
    # Torch's CUDA build pins its own; a version of the CPU build's here would make it impossible to install.
    assert [name for name in pinned if name == "triton" or name.startswith("nvidia")] == []
