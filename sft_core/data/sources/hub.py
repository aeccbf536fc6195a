"""Raw rows of a dataset on the hub: one split at a commit, streamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sft_core.data.sources.formats.json_files import RawRow
from sft_core.data.sources.hub_token import check_token
from sft_core.data.sources.read import ROWS_A_BATCH, without_nulls
from sft_core.data.sources.source import Description, Resolver, Source

if TYPE_CHECKING:
    from sft_core.recipe.datasets.kinds.hub import HubDataset


@dataclasses.dataclass(frozen=True)
class HubSource(Source):
    """A split of a hub dataset. The commit of its revision is the pin."""

    dataset: HubDataset

    @property
    def title(self) -> str:
        return self.dataset.id

    def pin(self, resolver: Resolver) -> str | None:
        return resolver.resolve("dataset", self.dataset.id, self.dataset.revision)

    def identity(self) -> Mapping[str, str | None]:
        return {key: getattr(self.dataset, key) for key in ("id", "config", "split")}

    def rows(self, pin: str, columns: list[str] | None) -> Iterator[RawRow]:
        return read_hub(self.dataset.id, self.dataset.config, self.dataset.split, pin, columns)

    def describe(self, licences: Mapping[str, str]) -> Description:
        dataset = self.dataset
        licence = licences.get(f"dataset {dataset.id}")
        return Description(dataset.id, dataset.config, dataset.split, [], licence)

    def shown(self) -> dict[str, Any]:
        values = super().shown()
        # Every dataset once had the key `path`: without it, the bytes of model cards would change.
        first_keys = {key: values[key] for key in ("name", "id", "config", "split", "revision")}
        return {**first_keys, "path": None, **values}

    @classmethod
    def origin(cls, section: Mapping[str, Any], list_files: Callable[[], list[str]]) -> dict[str, Any] | None:
        if section.get("id") is None:
            return None
        config = {"config": section["config"]} if section["config"] else {}
        return {"hub": section["id"], **config, "split": section["split"], "revision": section["pin"]}


SOURCE = HubSource


def read_hub(id: str, config: str | None, split: str, commit: str, columns: list[str] | None) -> Iterator[RawRow]:
    """(split and row number, row) of each row of one split at a commit, in stored order. Fetches no other split.

    A gated or private dataset needs a token in the environment (HF_TOKEN). Raises ValueError for an unknown config,
    split or column and for a dataset without access, ConnectionError when the hub cannot be reached.
    """
    import datasets

    # By default `datasets` waits for minutes on a hub that is down, and the hub's client retries by itself.
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    check_token()
    try:
        builder = datasets.load_dataset_builder(id, config, revision=commit)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"{error} Where it is gated or private, ask for access and set HF_TOKEN.") from None
    if builder.hash != commit:
        # Without the hub, `datasets` only warns and takes whatever commit its cache holds.
        raise ConnectionError(f"{id}: asked for commit {commit}; the hub cannot be reached and the cache has another")
    files = builder.config.data_files or {}
    if split not in files:
        raise ValueError(f"{id} (config {builder.config.name}): no split {split!r}; it has {', '.join(sorted(files))}")
    # Load the split by its files: by its name, `datasets` would cast it to the features of the first split.
    is_parquet = builder.name == "parquet"
    options: dict[str, Any] = {"batch_size": ROWS_A_BATCH, "columns": columns or None} if is_parquet else {}
    try:
        rows = datasets.load_dataset(
            builder.name, data_files={split: list(files[split])}, split=split, streaming=True, **options
        )
        rows = rows.select_columns(columns) if columns and not is_parquet else rows
        for index, row in enumerate(rows):
            yield f"{id} {split}: row {index}", without_nulls(row)
    except (pa.ArrowInvalid, ValueError) as error:
        raise ValueError(f"{id} (config {builder.config.name}, split {split}): {error}") from error
