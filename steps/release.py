"""release: the scored checkpoint with its model card, and where the recipe says so, both on the hub."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from sft_core.pins import PinnedRecipe, is_local
from sft_core.release.folder import build_release
from sft_core.release.push import build_pushed
from sft_core.store.stage import Needs, Part, Stage
from steps.deliver import delivered, round_of
from steps.download import CONVERSATIONS
from steps.harness import scored_tasks, scorings
from steps.mix import MIXTURE
from steps.report import REPORT
from steps.tokenize import TOKENS
from steps.train import TRAINED


def _section(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    return {
        "recipe": shown_recipe(pinned),
        "base": _base(pinned),
        "sources": [_source(pinned, name) for name in pinned.recipe.sources],
        "tasks": scored_tasks(pinned, part),
        "not_scored": list(part.get("without", ())),
    }


def shown_recipe(pinned: PinnedRecipe) -> dict[str, Any]:
    """The recipe as its card shows it: what shapes the result, with the names of local files but not their folders."""
    recipe = copy.deepcopy(pinned.recipe.model_dump(mode="json", exclude={"runtime", "hub"}))
    for key in ("model_name_or_path", "tokenizer_name_or_path"):
        if (name := recipe["model"][key]) is not None and is_local(name):
            recipe["model"][key] = Path(name).name
    if (template := recipe["chat_template"]["template"]) is not None:
        recipe["chat_template"]["template"] = Path(template).name
    schemas = recipe["evaluation"]["json_schema_by_task"]
    schemas.update({task: Path(schema).name for task, schema in schemas.items() if isinstance(schema, str)})
    if (lm_eval := recipe["evaluation"]["lm_eval"]) is not None and lm_eval["include_path"] is not None:
        lm_eval["include_path"] = Path(lm_eval["include_path"]).name
    for shown, dataset in zip(
        recipe["dataset_mixture"]["datasets"], pinned.recipe.dataset_mixture.datasets, strict=True
    ):
        shown["path"] = [Path(path).name for path in dataset.paths] or None
    return recipe


def _base(pinned: PinnedRecipe) -> dict[str, Any]:
    model = pinned.recipe.model
    identity = pinned.model_identity
    name = model.model_name_or_path
    if name is None:
        kind = (model.config or {})["model_type"]
        return {"name": f"random weights ({kind})", "hub_id": None, "revision": None, "licence": None}
    hub_id = None if is_local(name) else name
    return {
        "name": hub_id or Path(name).name,
        "hub_id": hub_id,
        "revision": identity["pin"],
        "licence": _licences(pinned).get(f"model {name}"),
    }


def _source(pinned: PinnedRecipe, name: str) -> dict[str, Any]:
    dataset = pinned.recipe.dataset(name)
    return {
        "name": name,
        "hub_id": dataset.id,
        "config": dataset.config,
        "split": dataset.split if dataset.id else None,
        "files": [Path(path).name for path in dataset.paths],
        "revision": pinned.source_pin(name),
        "licence": _licences(pinned).get(f"dataset {dataset.id}"),
    }


def _licences(pinned: PinnedRecipe) -> dict[str, str]:
    return pinned.pins.get("licences", {})


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    return {"trained": delivered(pinned), **scorings(pinned, part)}


def _mentions(pinned: PinnedRecipe, part: Part) -> Needs:
    """Counts and addresses stand in manifests: behind a URL no data comes with them."""
    training = (TRAINED, round_of(pinned))
    packs = TRAINED.needs(pinned, round_of(pinned))["packs"]
    found: Needs = {"report": (REPORT, part), "training": training, "packs": packs, "mixture": (MIXTURE, {})}
    for source in pinned.recipe.sources:
        found[f"tokens:{source}"] = (TOKENS, {"source": source})
        found[f"conversations:{source}"] = (CONVERSATIONS, {"source": source})
    return found


RELEASED = Stage(
    "release",
    build_release,
    section=_section,
    needs=_needs,
    mentions=_mentions,
    libraries=("huggingface_hub",),
    verify_inputs=True,
)


def _target(pinned: PinnedRecipe, part: Part) -> dict[str, Any]:
    assert pinned.recipe.hub is not None, "what is to be pushed is planned where the recipe says so"
    return pinned.recipe.hub.model_dump(mode="json")


# The version stands for sft_core/release/push.py: what is on the hub is not pushed again for a rename.
PUSHED = Stage(
    "pushed",
    build_pushed,
    section=_target,
    needs=lambda pinned, part: {"release": (RELEASED, {})},
    version=1,
    verify_inputs=True,
)
