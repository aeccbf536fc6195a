"""Columns of JSON: data sets hold tools, turns and arguments either parsed or as text."""

from __future__ import annotations

import json
from typing import Any

from sft_core.data.sources.rejects import Rejected


def json_list(value: Any, name: str) -> list[Any]:
    """The list in a column; an empty list for an empty column. Raises Rejected (invalid_json)."""
    if not value:
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Rejected("invalid_json", f"`{name}` is a string that is not JSON") from None
    if not isinstance(value, list):
        raise Rejected("invalid_json", f"`{name}` is a list; found {type(value).__name__}")
    return value
