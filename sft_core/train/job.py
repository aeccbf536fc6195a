"""The job of a training's ranks: the recipe's settings, and the paths of inputs on this machine.

Invariant: jobs are written to logs/job.json and read from it here alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from sft_core.recipe.sections import Runtime, Training

Job = TypeVar("Job")


@dataclasses.dataclass(frozen=True)
class ModelLoader:
    """The path of the start model, and how to load its weights. config: use random weights instead of a file's."""

    path: str | None
    revision: str | None
    config: dict[str, Any] | None  # of transformers
    dtype: str
    attn_implementation: str
    stop_tokens: list[str]
    trust_remote_code: bool


@dataclasses.dataclass(frozen=True)
class TokenizerLoader:
    path: str
    revision: str | None
    add_special_tokens: list[str]
    eos_token: str | None
    trust_remote_code: bool


@dataclasses.dataclass(frozen=True)
class SelectionSpec:
    """How often the selection rows are evaluated, and whether training ends with the weights of the lowest loss."""

    every_epochs: float
    keep_best: bool


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """The settings of a training that do not depend on the machine.

    rank_module: the module that each rank runs. num_models: how many models (weights without an optimizer) are on the
    disk at once.
    """

    rank_module: str
    model: ModelLoader
    tokenizer: TokenizerLoader
    chat_template: str | None
    training: Training
    sources: list[str]
    selection: SelectionSpec | None = None
    num_models: int = 1

    @property
    def computes_in_half(self) -> bool:
        """Whether the model computes in half precision: by autocast, or by its weights."""
        return self.training.bf16 or self.model.dtype == "bfloat16"


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """A training on this machine.

    round: the number of a search's roll-out, else 0. out: the folder that gets checkpoints/, model/ and logs/. packs:
    of the plan. tokens: each source's folders, in the order in which the plan numbers their rows. selection_packs:
    of the selection rows, where `spec.selection` is. num_threads: CPU threads of a rank.
    """

    spec: TrainSpec
    round: int
    out: Path
    packs: Path
    tokens: list[list[Path]]
    selection_packs: Path | None
    runtime: Runtime
    num_threads: int


def job_path(out: Path) -> Path:
    """The path of the job of a training in `out`."""
    return out / "logs" / "job.json"


def write_job(job: object, out: Path) -> Path:
    """Writes the job of a training in `out`, and returns the file's path."""
    path = job_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(TypeAdapter(type(job)).dump_json(job, indent=1))
    return path


def read_job(kind: type[Job], path: Path) -> Job:
    return TypeAdapter(kind).validate_json(path.read_bytes())
