"""The interface of every kind of source. Only the registry knows the kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from sft_core.data.sources.formats.json_files import RawRow
    from sft_core.recipe.datasets.dataset import Dataset


class Resolver(Protocol):
    """Asks the hub which commit a branch or a tag names, once for each name."""

    def resolve(self, kind: str, id: str, revision: str) -> str | None:
        """The commit of a `dataset` or `model`; None where the hub does not answer and a plan goes on without it."""


class Description(NamedTuple):
    """Where rows come from, for a model card: a hub dataset, or names of files or the like."""

    hub_id: str | None
    config: str | None
    split: str | None
    files: list[str]
    licence: str | None


class Source(Protocol):
    """The rows of one dataset of the recipe.

    An identity and a pin go into keys, so they say what the rows are and never where this machine keeps them.
    """

    dataset: Dataset

    @property
    def title(self) -> str:
        """The source in messages and beside the progress bar."""

    def pin(self, resolver: Resolver) -> str | None:
        """Identifies the rows as they are now: a digest or a commit. None: not known in a plan without a network.

        Raises FileNotFoundError for missing files, and Unresolved for a name that cannot be reached.
        """

    def identity(self) -> Mapping[str, str | None]:
        """The keys of this kind that choose rows. The pin and the keys of all kinds (columns, format) come beside."""

    def rows(self, pin: str, columns: list[str] | None) -> Iterator[RawRow]:
        """(place, row) of each raw row, in a fixed order. Raises ValueError where the rows are no longer the pin's."""

    def peek(self, max_bytes: int | None, columns: list[str] | None) -> Iterator[RawRow] | None:
        """The rows as they are now, if they are on this machine and at most max_bytes; else None. Fetches nothing."""
        return None

    def describe(self, licences: Mapping[str, str]) -> Description:
        """licences: by `dataset ID`, as far as the hub knew them when the recipe was pinned."""
        return Description(None, None, None, [self.title], None)

    def shown(self) -> dict[str, Any]:
        """The dataset's keys for a model card, without folders of this machine."""
        values = self.dataset.model_dump(mode="json")
        return {key: values[key] for key in self.dataset.ordered_keys()}

    @classmethod
    def origin(cls, section: Mapping[str, Any], list_files: Callable[[], list[str]]) -> dict[str, Any] | None:
        """Where an output of the store comes from, read off its section; None for a section of another kind.

        list_files: gives the names of the files that the rows came from.
        """
