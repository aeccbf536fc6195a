"""Counts that a stage leaves in its manifest: written by its builder, read by cards, reports and later stages.

Invariant: the JSON has a key for each field, in the order of the fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of one stage, or a part of them. A field without a default stands in every manifest ever written."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Reads a manifest's counts. Unknown keys are ignored; keys that an older version did not write take the
        fields' defaults."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})
