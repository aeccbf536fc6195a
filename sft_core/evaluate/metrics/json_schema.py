"""The metric `json_schema`: whether a whole output is JSON that the user's schema accepts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import JsonValue

from sft_core.evaluate.metrics.json_answers import Json

if TYPE_CHECKING:
    from sft_core.recipe.evaluation import Evaluation

Schema = dict[str, JsonValue]


class JsonSchema(Json):
    """Valid JSON that the schema accepts. Raises ValueError for an invalid schema."""

    name = "json_schema"
    library = "jsonschema"
    asks_for = ("schema",)

    def __init__(self, schema: Schema):
        self._validator = _validator(schema)

    @classmethod
    def settings(cls, name: str, evaluation: Evaluation, task: str) -> dict[str, JsonValue]:
        return {"schema": read_schema(evaluation.json_schema_by_task[task])}

    @classmethod
    def load(cls, identity: Mapping[str, Any]) -> Self:
        return cls(identity["schema"])

    def accepts(self, value: Any) -> bool:
        return self._validator.is_valid(value)


def read_schema(given: str | Schema) -> Schema:
    """The schema itself, or the one in the file of this path. Raises ValueError for a file that cannot be read."""
    if isinstance(given, dict):
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"found {given!r}; no such file (looked in {Path.cwd()})")
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"{path}: a schema is a JSON object; found {type(schema).__name__}")
    return schema


def _validator(schema: Schema) -> Any:
    """Raises ValueError for an invalid schema, and for a reference to another document: nothing is downloaded."""
    import jsonschema
    import referencing
    import referencing.jsonschema

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"is no JSON schema: {error.json_path}: {error.message}") from None
    dialect = referencing.jsonschema.specification_with(kind.META_SCHEMA["$schema"])
    resource = dialect.create_resource(schema)
    registry: Any = referencing.Registry().with_resource(resource.id() or "", resource).crawl()
    resolver = registry.resolver(resource.id() or "")
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except referencing.exceptions.Unresolvable:
            raise ValueError(f"refers to {reference!r}, which is not in it; write it below $defs") from None
    return kind(schema, registry=registry)


def _references(schema: Any) -> list[str]:
    """Every $ref of a schema and of the schemas inside it."""
    if isinstance(schema, list):
        return [reference for element in schema for reference in _references(element)]
    if not isinstance(schema, dict):
        return []
    at_the_top = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    return at_the_top + [reference for element in schema.values() for reference in _references(element)]
