"""A kind of dataset that the project does not have: rows of an SQLite database. The key `sqlite` names the file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from sft_core.recipe.datasets.dataset import Dataset


class SqliteDataset(Dataset):
    """Conversations that a query selects."""

    key: ClassVar[str] = "sqlite"
    meaning: ClassVar[str] = "a query of an SQLite database"

    sqlite: str = Field(description="the database's file")
    query: str = Field("SELECT * FROM chats", description="one row a conversation, in a fixed order")

    @property
    def default_name(self) -> str:
        return Path(self.sqlite).stem

    @classmethod
    def claims(cls, text: str) -> bool:
        return text.endswith(".sqlite")


SECTION = SqliteDataset
