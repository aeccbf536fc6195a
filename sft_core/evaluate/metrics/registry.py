"""The metrics by their names: every file of this folder is imported, and the classes in it are the metrics.

Invariant: no list of metrics stands anywhere. A new file in this folder is enough for a recipe to name its metric.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sft_core.evaluate import metrics
from sft_core.evaluate.metrics.metric import Metric
from sft_core.recipe.wording import nearest, short

if TYPE_CHECKING:
    from sft_core.recipe.evaluation import Evaluation

_REQUIRED = ("name", "is_share")


@functools.cache
def metric_classes() -> dict[str, type[Metric]]:
    """The class of each metric by its name, sorted by name; a user's function stands under the form of its name.

    Raises TypeError for a class that lacks a fact, and for two with a name.
    """
    classes: dict[str, type[Metric]] = {}
    for module in pkgutil.iter_modules(metrics.__path__, f"{metrics.__name__}."):
        for kind in vars(importlib.import_module(module.name)).values():
            if not _is_metric(kind, module.name):
                continue
            if missing := [fact for fact in _REQUIRED if not hasattr(kind, fact)]:
                raise TypeError(f"{module.name}.{kind.__name__}: states no {missing[0]}; see metrics/metric.py")
            if (other := classes.setdefault(kind.name, kind)) is not kind:
                raise TypeError(f"{module.name}.{kind.__name__}: {other.__module__} has a metric {kind.name}, too")
    return dict(sorted(classes.items()))


def _is_metric(value: Any, module: str) -> bool:
    """Whether it is a metric that this module defines, not one that it imports."""
    is_kind = isinstance(value, type) and issubclass(value, Metric) and not inspect.isabstract(value)
    return is_kind and value.__module__ == module


def metric_class(name: str) -> type[Metric]:
    """The metric that a recipe means by this name. Raises ValueError that names the nearest."""
    classes = metric_classes()
    for kind in classes.values():
        if kind.means(name):
            return kind
    raise ValueError(
        f"found {short(name)}; it is no metric, and no function as package.module:function{nearest(name, [*classes])}"
    )


def check_names(evaluation: Evaluation) -> None:
    """Raises ValueError for a metric that does not exist, a schema that is missing, and one that no task asks for.

    Whoever reads a recipe calls it (steps/runs/recipes.py): the recipe itself stands below the metrics.
    """
    for task in evaluation.metric_by_task:
        _class_of(evaluation, task)
    for task in evaluation.json_schema_by_task:
        if "schema" not in _class_of(evaluation, task).asks_for:
            names = [name for name, kind in metric_classes().items() if "schema" in kind.asks_for]
            raise ValueError(
                f"evaluation.json_schema_by_task.{task}: no answer is held against it; set metric_by_task.{task} to "
                f"{' or '.join(names)}, or remove it"
            )


def _class_of(evaluation: Evaluation, task: str) -> type[Metric]:
    """The metric of a task. Raises ValueError for one that does not exist, and for a schema that is missing."""
    name = evaluation.metric_of(task)
    try:
        kind = metric_class(name)
    except ValueError as error:
        raise ValueError(f"evaluation.metric_by_task.{task}: {error}") from None
    if "schema" in kind.asks_for and task not in evaluation.json_schema_by_task:
        raise ValueError(
            f"evaluation.metric_by_task.{task}: found {name!r}, and no schema; give json_schema_by_task.{task}"
        )
    return kind


def metric_identity(evaluation: Evaluation, task: str) -> dict[str, Any]:
    """What a task's scores depend on besides the answers, as JSON: the metric, its settings, its library's version.

    Raises ValueError as `check_names`, for settings that cannot be read, as a schema's file, and for a library that is
    missing.
    """
    name, kind = evaluation.metric_of(task), _class_of(evaluation, task)
    try:
        identity = {"name": name, **kind.settings(name, evaluation, task)}
    except ValueError as error:
        raise ValueError(f"{_key(kind, task)}: {error}") from None
    if kind.library is not None:
        if importlib.util.find_spec(kind.library.replace("-", "_")) is None:
            raise ValueError(
                f"evaluation.metric_by_task.{task}: found {name!r}, and {kind.library} is not installed; "
                "pip install 'sft-flow[eval]'"
            )
        identity["library"] = importlib.metadata.version(kind.library)
    return identity


def load_metric(identity: Mapping[str, Any]) -> Metric:
    """The metric of an identity. Raises ValueError for a schema that is none and a function that cannot be called."""
    return metric_class(identity["name"]).load(identity)


def check_metrics(evaluation: Evaluation, tasks: list[str]) -> None:
    """Raises ValueError for a metric that would fail when the answers are there."""
    check_names(evaluation)
    for task in tasks:
        identity = metric_identity(evaluation, task)
        try:
            load_metric(identity)
        except ValueError as error:
            raise ValueError(f"{_key(metric_class(identity['name']), task)}: {error}") from error


def _key(kind: type[Metric], task: str) -> str:
    """The key of the recipe that a metric's settings come from."""
    return f"evaluation.{'json_schema' if 'schema' in kind.asks_for else 'metric'}_by_task.{task}"
