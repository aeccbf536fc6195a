"""What every kind of source can be asked. Nobody else knows what kinds there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from sft_core.data.sources.formats.json_files import RawRow
    from sft_core.recipe.datasets.dataset import Dataset


class Resolver(Protocol):
    """Asks the hub, once for each name, what a branch or a tag stands for."""

    def resolve(self, kind: str, id: str, revision: str) -> str | None:
        """The commit of a `dataset` or `model`; None where it cannot be had and a plan goes on without it."""


class Description(NamedTuple):
    """Where rows come from, as a model card tells it: a hub dataset, or else names of files or the like."""

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
        """What the rows are now, as one string: a digest or a commit. None: not known in a plan without a network.

        Raises FileNotFoundError for missing files, and Unresolved for what cannot be reached.
        """

    def identity(self) -> dict[str, Any]:
        """The keys that choose rows, beside the pin and beside what all datasets have (columns, format)."""

    def rows(self, pin: str, columns: list[str] | None) -> Iterator[RawRow]:
        """(place, row) of each raw row, in a fixed order. Raises ValueError where the rows are no longer the pin's."""

    def peek(self, max_bytes: int | None, columns: list[str] | None) -> Iterator[RawRow] | None:
        """The rows as they are now, where this machine has them and they are no larger; None: nothing is fetched."""
        return None

    def describe(self, licences: Mapping[str, str]) -> Description:
        """licences: by `dataset ID`, as far as the hub told them when the recipe was pinned."""
        return Description(None, None, None, [self.title], None)

    def shown(self) -> dict[str, Any]:
        """The dataset's keys as a model card shows the recipe: without the folders of this machine."""
        values = self.dataset.model_dump(mode="json")
        return {key: values[key] for key in self.dataset.ordered_keys()}

    @classmethod
    def origin(cls, section: Mapping[str, Any], list_files: Callable[[], list[str]]) -> dict[str, Any] | None:
        """Where an output of the store comes from, from its section; None where the section is of another kind.

        list_files: the names of files that the rows say they come from.
        """
