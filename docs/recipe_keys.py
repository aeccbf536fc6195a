"""Writes docs/recipe.md, the page of every recipe key, from the recipe's own types: `python docs/recipe_keys.py`.

A test compares the committed page with `page()`, so a key, a default or a description changes in one place.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft_core.recipe.recipe import Recipe  # noqa: E402

PAGE = ROOT / "docs" / "recipe.md"
INTRODUCTION = """\
# Every key of a recipe

`python docs/recipe_keys.py` writes this page from the recipe's types ([recipe.py](../sft_core/recipe/recipe.py),
[sections.py](../sft_core/recipe/sections.py), [datasets/](../sft_core/recipe/datasets/mixture.py),
[evaluation.py](../sft_core/recipe/evaluation.py)), and a test compares the two.

A recipe is one YAML file. `python flows/sft_flow.py --config recipe RECIPE run` runs it, and `sft plan RECIPE` says
what a run will do. The README shows [a recipe](../README.md#a-recipe), and `configs/` holds several. A key has the name
that the alignment-handbook or TRL gives it, where they have such a key.

- An unknown key is an error, which names the nearest known key. A key that stands twice is an error, too.
- A key without a default is required. `null` stands for no value.
- `--set KEY=VALUE` changes a key for one run, and the run records the change. The key is written as on this page.
  NAME is a dataset's name or its number from 0: `--set dataset_mixture.datasets.NAME.weight=0.5`.
- A recipe of one phase has the phase's keys (`dataset_mixture`, `packing`, `training`, `search`) at its root. A recipe
  of several names them: `phases: {mid: {...}, sft: {...}}`. `--set` then says which one:
  `--set phases.sft.training.seed=1`.
- `sft init` writes a first recipe with comments. `sft import` turns an alignment-handbook or TRL recipe into ours.
- The section `runtime` says where and how a run works. It is never part of an output's identity, so a change there
  rebuilds nothing. Every other key is part of the identity of the outputs that it shapes ([store](store.md)).
"""
ANY_JSON = "#/$defs/JsonValue"  # the schema's name for the values of a mapping such as model.config
BOUNDS = (
    ("exclusiveMinimum", "over {}"),
    ("minimum", "at least {}"),
    ("exclusiveMaximum", "under {}"),
    ("maximum", "at most {}"),
)


def page() -> str:
    schema = Recipe.model_json_schema()
    return "\n\n".join([INTRODUCTION.rstrip(), *_sections(schema, schema, "", "The recipe")]) + "\n"


class _Below(NamedTuple):
    """A section below a key. Where a key holds sections of several kinds, their required keys tell them apart."""

    place: str
    title: str
    section: dict[str, Any]


def _sections(schema: dict[str, Any], section: dict[str, Any], path: str, title: str) -> Iterator[str]:
    """The Markdown of a section, then of those below it. path: what its keys begin with."""
    definitions, below = schema.get("$defs", {}), []
    rows = ["| key | values | default | meaning |", "|-|-|-|-|"]
    for name, value in section["properties"].items():
        key, is_required = f"{path}{name}", name in section.get("required", ())
        inner = list(_below(key, value, definitions))
        if key == "phases":  # whose keys stand at the root where there is one
            inner = [below._replace(place="", title="A phase") for below in inner]
        values = " or ".join(_link(one) for one in inner) or _values(value)
        text = value.get("description") or (inner[0].section.get("description", "") if len(inner) == 1 else "")
        rows.append(f"| `{key}` | {values} | {_default(value, bool(inner), is_required)} | {_cell(text)} |")
        below += inner
    text = " ".join(section.get("description", "").split())
    yield "\n\n".join(filter(None, [f"## {title}", text, "\n".join(rows)]))
    for one in below:
        yield from _sections(schema, one.section, f"{one.place}." if one.place else "", one.title)


def _below(key: str, value: dict[str, Any], definitions: dict[str, Any]) -> Iterator[_Below]:
    sections = [(f"{key}{'.NAME' if many else ''}", definitions[name]) for name, many in _sections_in(value)]
    for place, section in sections:
        kind = "".join(f" with `{required}`" for required in section["required"]) if len(sections) > 1 else ""
        yield _Below(place, f"`{place}`{kind}", section)


def _sections_in(value: dict[str, Any], many: bool = False) -> Iterator[tuple[str, bool]]:
    """(name, whether there may be several of it) of the sections that a key holds, beside null or other values."""
    if "$ref" in value and value["$ref"] != ANY_JSON:
        yield value["$ref"].rpartition("/")[2], many
    for one in (*value.get("anyOf", ()), *value.get("oneOf", ())):
        yield from _sections_in(one, many)
    for of_many in (
        value.get("items"),
        value.get("additionalProperties"),
        *value.get("patternProperties", {}).values(),
    ):
        if isinstance(of_many, dict):
            yield from _sections_in(of_many, True)


def _link(below: _Below) -> str:
    if not below.place:
        return "[sections by name](#a-phase)"
    kind = below.title.removeprefix(f"`{below.place}`")
    anchor = re.sub(r"[^\w -]", "", below.title.lower()).replace(" ", "-")
    return f"[section{'s' if below.place.endswith('.NAME') else ''}{kind}](#{anchor})"


def _values(value: dict[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(_values(one) for one in value["anyOf"] if one.get("type") != "null")
    if "enum" in value or "const" in value:
        return ", ".join(f"`{choice}`" for choice in value.get("enum", [value.get("const")]))
    if value["type"] == "array":
        return f"list of {_values(value['items'])}"
    if value["type"] == "object":
        of = value.get("additionalProperties")
        return f"mapping to {_values(of)}" if isinstance(of, dict) and of != {"$ref": ANY_JSON} else "mapping"
    names = {"string": "text", "boolean": "`true`, `false`"}
    kind = value.get("format") or names.get(value["type"], value["type"])
    if value.get("minimum") == 0 and value.get("maximum") == 1:
        return f"{kind}, 0 to 1"
    return ", ".join([kind, *(text.format(_number(value[bound])) for bound, text in BOUNDS if bound in value)])


def _number(bound: float) -> str:
    return f"{bound:,}" if bound >= 1e6 else f"{bound:g}"


def _default(value: dict[str, Any], is_section: bool, is_required: bool) -> str:
    if is_required:
        return "required"
    if is_section and value.get("default") is not None:
        return "its defaults"
    return f"`{json.dumps(value.get('default'), ensure_ascii=False)}`"


def _cell(text: str) -> str:
    """Text that a table's cell shows as it is."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
