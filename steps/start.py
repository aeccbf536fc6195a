"""The checks before a run: bad input gets a clear error here, not after hours of work."""

from __future__ import annotations

import logging
from pathlib import Path

from sft_core.evaluate.metrics.registry import check_metrics
from sft_core.evaluate.with_vllm import unmet_vllm
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.recipe import Recipe
from sft_core.release.push import check_push
from sft_core.store.stage import Located
from sft_core.store.store import Store
from sft_core.train.accelerator import check_machine, has_gpu, lost_updates, slow_precision, unseen_gpu
from sft_core.train.arguments import check_extra, check_report_to
from sft_core.train.model_files import check_files, model_folder
from steps.cluster import on_cluster
from steps.evaluate import EVALUATED
from steps.plan import phases_to_train, plan
from steps.release import PUSHED
from steps.report_prompts import check_report_prompts, count_report_prompts
from steps.toy import rendering_warnings
from steps.train import TRAINED
from steps.verdict import device, ensure_verdicts

log = logging.getLogger(__name__)


def prepare(recipe: Recipe) -> PinnedRecipe:
    """The recipe with its names resolved. Raises ValueError or OSError for faults that would end a run later."""
    check_place(recipe)
    searched = [
        source
        for phase in recipe.phases.values()
        if phase.search and phase.search.score == "answers"
        for source in phase.dataset_mixture.trained_sources
    ]
    check_metrics(recipe.evaluation, list(dict.fromkeys([*recipe.tasks, *searched])))
    pinned = pin(recipe)
    store = Store(recipe.runtime.store)
    check_report_prompts(count_report_prompts(store, pinned), pinned)
    planned = plan(store, pinned)
    if any(located.status != "hit" for located in planned):
        store.check_writable()
    if recipe.hub and any(located.stage is PUSHED and located.status != "hit" for located in planned):
        check_push(recipe.hub.model_id, recipe.hub.private)
    check_training(planned, pinned)
    if not on_cluster() and (unmet := unmet_engine(planned, recipe)):
        raise ValueError(unmet)
    warnings = []
    for phase in phases_to_train(planned, pinned):
        if not on_cluster():
            check_machine(recipe.for_phase(phase))
        if device() == "gpu":
            warnings.append(unseen_gpu(recipe.for_phase(phase)))
        check_report_to(recipe.runtime.report_to)
    warnings += [*rendering_warnings(planned, pinned), *model_warnings(planned, pinned)]
    for verdict in ensure_verdicts(store, pinned, planned):
        log.info(verdict.line)
        warnings += verdict.warnings
    for warning in dict.fromkeys(filter(None, warnings)):
        log.warning(warning)
    return pinned


def check_place(recipe: Recipe) -> None:
    """Raises ValueError for a store that a cluster's tasks cannot share, and for nodes that would share GPUs."""
    if recipe.runtime.num_nodes > 1 and has_gpu() and not on_cluster():
        raise ValueError(
            f"runtime.num_nodes: found {recipe.runtime.num_nodes}; here all of them would train on this machine's "
            "GPUs. Run `--with kubernetes` or `--with batch`, or --set runtime.num_nodes=1"
        )
    store = recipe.runtime.store
    if on_cluster() and "://" not in store and not Path(store).is_absolute():
        raise ValueError(
            f"runtime.store: found {store!r}; tasks on a cluster share no working folder: name a URL such as "
            "s3://bucket/prefix, or an absolute path on a file system that all of them mount"
        )


def model_warnings(planned: list[Located], pinned: PinnedRecipe) -> list[str]:
    """Warnings about a model that is still to be trained or scored. Raises ValueError for torn weight files."""
    recipe, warnings = pinned.recipe, []
    for phase in phases_to_train(planned, pinned):
        keys = recipe.for_phase(phase)
        warnings += [warning for warning in (lost_updates(keys), slow_precision(keys)) if warning]
    if any(located.stage in (TRAINED, EVALUATED) and located.status != "hit" for located in planned):
        loader = pinned.model_loader
        folder = model_folder(loader["path"], loader["revision"]) if loader["path"] is not None else None
        if folder is not None:
            check_files(folder, is_cache=loader["revision"] is not None)
    return list(dict.fromkeys(warnings))


def unmet_engine(planned: list[Located], recipe: Recipe) -> str | None:
    """What this machine lacks to generate the answers that are still to be scored; None if nothing."""
    is_open = any(located.stage is EVALUATED and located.status != "hit" for located in planned)
    return unmet_vllm(recipe.runtime.vllm) if recipe.evaluation.engine == "vllm" and is_open else None


def check_training(planned: list[Located], pinned: PinnedRecipe) -> None:
    """Raises ValueError for a wrong `training.extra`. Checks only phases to train."""
    for phase in phases_to_train(planned, pinned):
        check_extra(pinned.recipe.phases[phase].training.extra)
