"""Local files as a dataset of the recipe: the key `path`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from sft_core.recipe.datasets.dataset import Dataset


class FileDataset(Dataset):
    """Conversations in JSONL or Parquet files on this machine."""

    key: ClassVar[str] = "path"
    meaning: ClassVar[str] = "local files"

    path: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="JSONL or Parquet files (globs, .gz, .zst)"
    )

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def default_name(self) -> str:
        stem = Path(self.paths[0]).name.split(".")[0]
        return "".join(c if c.isalnum() or c in "._-" else "_" for c in stem) or "files"


SECTION = FileDataset
