"""The keys that datasets of all kinds have: a name, and which rows are taken."""

from __future__ import annotations

import abc
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sft_core.recipe.sections import PositiveInt, Section

SourceFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]


class Dataset(Section, abc.ABC):
    """One source of conversations. A subclass in recipe/datasets/kinds adds the keys that say where the rows are."""

    key: ClassVar[str]  # the recipe knows the kind by this key
    meaning: ClassVar[str]  # of `key`, for messages

    name: str | None = Field(None, description="default: the split, or the file's name", pattern=r"^[A-Za-z0-9._-]+$")
    columns: tuple[str, ...] | None = Field(None, description="keep only these columns")
    format: SourceFormat = Field("auto", description="how rows are written; auto: by the keys of each row")
    weight: Annotated[float, Field(ge=0)] | None = Field(
        None, description="share of the rows kept; over 1 repeats rows"
    )
    num_rows: PositiveInt | None = Field(None, description="rows kept, instead of a weight")
    trained_token_share: Annotated[float, Field(ge=0)] | None = Field(
        None, description="share of the mixture's trained tokens, in proportion to the other datasets'; for all or none"
    )

    @model_validator(mode="after")
    def _at_most_one_amount(self) -> Dataset:
        amounts = [key for key in ("weight", "num_rows", "trained_token_share") if getattr(self, key) is not None]
        if len(amounts) > 1:
            raise ValueError(f"give either {' or '.join(amounts)}")
        return self

    @property
    def source(self) -> str:
        """The name by which everything else calls this source."""
        return self.name or self.default_name

    @property
    @abc.abstractmethod
    def default_name(self) -> str:
        """The source's name where the recipe gives none: letters, digits, `.`, `_` and `-`."""

    @classmethod
    def kind(cls) -> str:
        """The name of the kind's module. Its reader has the same name in sft_core/data/sources."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def claims(cls, text: str) -> bool:
        """Whether text on a command line is a value of `key`. Text that no kind claims means files."""
        return False

    @classmethod
    def ordered_keys(cls) -> list[str]:
        """All keys in the order in which a person writes them: name, where the rows are, which rows are taken."""
        name, *common = Dataset.model_fields
        return [name, *(key for key in cls.model_fields if key not in Dataset.model_fields), *common]
