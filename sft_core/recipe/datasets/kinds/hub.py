"""A dataset of the Hugging Face hub as a dataset of the recipe: the key `id`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sft_core.local_files import is_local, looks_like_files
from sft_core.recipe.datasets.dataset import Dataset


class HubDataset(Dataset):
    """Conversations in one split of a dataset on the hub."""

    key: ClassVar[str] = "id"
    meaning: ClassVar[str] = "a hub dataset"

    id: str = Field(description="owner/name on the hub")
    config: str | None = Field(None, description="of several configs of one dataset; default: the hub's")
    split: str = Field("train", description="of the hub dataset")
    revision: str = Field("main", description="a branch, a tag or a commit")

    @property
    def default_name(self) -> str:
        return self.split if self.split != "train" else self.id.split("/")[-1]

    @classmethod
    def claims(cls, text: str) -> bool:
        return not is_local(text) and not looks_like_files(text)


SECTION = HubDataset
