"""release: the scored checkpoint with its model card; a recipe with a hub section pushes both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from sft_core.data.sources.registry import source_of
from sft_core.evaluate import harness
from sft_core.evaluate.metrics.registry import metric_class
from sft_core.local_files import is_local
from sft_core.pins.pinned import PinnedRecipe
from sft_core.release.folder import build_release
from sft_core.release.push import build_pushed
from sft_core.store.stage import Json, Needs, Part, Section, Stage
from steps.download import CONVERSATIONS
from steps.mix import MIXTURE
from steps.report import REPORT
from steps.scored import scored_tasks, scorings
from steps.tokenize import TOKENS
from steps.train import MODEL, TRAINED, checkpoint_of, last_round


def _section(pinned: PinnedRecipe, part: Part) -> Section:
    return {
        "recipe": shown_recipe(pinned),
        "base": _base(pinned),
        "models": pinned.recipe.models,
        "phases": {name: _label(pinned, name) for name in pinned.recipe.phases},
        "sources": [_source(pinned, name) for name in pinned.recipe.sources],
        "tasks": scored_tasks(pinned, part),
        "not_scored": list(part.get("without", ())),
        "shares": _shares(pinned),
    }


def _shares(pinned: PinnedRecipe) -> list[str]:
    """The metrics whose score is a share of right answers: the card gives them other intervals."""
    evaluation = pinned.recipe.evaluation
    metrics = {evaluation.metric_of(task) for task in pinned.recipe.tasks}
    shares = {name for name in metrics if metric_class(name).is_share}
    return sorted(shares.union(harness.SHARES if evaluation.lm_eval is not None else ()))


def shown_recipe(pinned: PinnedRecipe) -> dict[str, Any]:
    """The recipe as its card shows it: without `runtime` and `hub`, and local files by name without their folders."""
    recipe = copy.deepcopy(pinned.recipe.as_written(exclude=("runtime", "hub")))
    for key in ("model_name_or_path", "tokenizer_name_or_path"):
        if (name := recipe["model"][key]) is not None and is_local(name):
            recipe["model"][key] = Path(name).name
    if (template := recipe["chat_template"]["template"]) is not None:
        recipe["chat_template"]["template"] = Path(template).name
    schemas = recipe["evaluation"]["json_schema_by_task"]
    schemas.update({task: Path(schema).name for task, schema in schemas.items() if isinstance(schema, str)})
    if (lm_eval := recipe["evaluation"]["lm_eval"]) is not None and lm_eval["include_path"] is not None:
        lm_eval["include_path"] = Path(lm_eval["include_path"]).name
    for name, phase in pinned.recipe.phases.items():
        keys = recipe["phases"][name] if "phases" in recipe else recipe
        datasets = phase.dataset_mixture.datasets
        keys["dataset_mixture"]["datasets"] = [source_of(dataset).shown() for dataset in datasets]
    return recipe


def _label(pinned: PinnedRecipe, phase: str) -> str:
    """The ending of the names of a phase's inputs; empty for a recipe of one phase."""
    return f" of {phase}" if len(pinned.recipe.phases) > 1 else ""


def _base(pinned: PinnedRecipe) -> dict[str, Json]:
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


def _source(pinned: PinnedRecipe, name: str) -> dict[str, Json]:
    description = source_of(pinned.recipe.dataset(name)).describe(_licences(pinned))
    phase = pinned.recipe.phase_of(name)
    return {"name": name, "phase": phase, **description._asdict(), "revision": pinned.source_pin(name)}


def _licences(pinned: PinnedRecipe) -> dict[str, str]:
    return pinned.pins.get("licences", {})


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    return {"trained": checkpoint_of(pinned, [*pinned.recipe.phases][-1]), **scorings(pinned, part)}


def _reads_manifest_of(pinned: PinnedRecipe, part: Part) -> Needs:
    """The outputs of which only counts and addresses are read: behind a URL no data is downloaded for them."""
    manifests: Needs = {"report": (REPORT, part)}
    for phase in pinned.recipe.phases:
        label, trained = _label(pinned, phase), last_round(pinned, phase)
        manifests[f"training{label}"] = (TRAINED, trained)
        manifests[f"packs{label}"] = TRAINED.needs(pinned, trained)["packs"]
        manifests[f"mixture{label}"] = (MIXTURE, pinned.part_of(phase))
    for source in pinned.recipe.sources:
        manifests[f"tokens:{source}"] = (TOKENS, {"source": source})
        manifests[f"conversations:{source}"] = (CONVERSATIONS, {"source": source})
    return manifests


RELEASED = Stage(
    "release",
    build_release,
    section=_section,
    needs=_needs,
    reads={TRAINED.name: MODEL},
    reads_manifest_of=_reads_manifest_of,
    libraries=("huggingface_hub",),
)


def _target(pinned: PinnedRecipe, part: Part) -> Section:
    assert pinned.recipe.hub is not None, "a plan has this stage only for a recipe with a hub section"
    return pinned.recipe.hub.model_dump(mode="json")


# The version stands for sft_core/release/push.py, so that a rename there pushes nothing again.
PUSHED = Stage(
    "pushed",
    build_pushed,
    section=_target,
    needs=lambda pinned, part: {"release": (RELEASED, {})},
    version=1,
)
