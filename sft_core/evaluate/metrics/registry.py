"""The metrics by their names: the classes in the files of this folder.

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
    from pydantic import JsonValue

    from sft_core.recipe.evaluation import Evaluation

_REQUIRED = ("name", "is_share")


@functools.cache
def metric_classes() -> dict[str, type[Metric]]:
    """The class of each metric, sorted by name. The class of users' functions has the form of their names as its name.

    Raises TypeError for a class without a required fact, and for two classes with one name.
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
    """Raises ValueError for an unknown metric, for a missing schema, and for a schema that no metric reads.

    steps/runs/recipes.py calls it for each recipe: the recipe's own checks cannot import metrics, a layer above.
    """
    for task in evaluation.metric_by_task:
        _class_of(evaluation, task)
    for task in evaluation.json_schema_by_task:
        if "schema" not in _class_of(evaluation, task).asks_for:
            names = [name for name, kind in metric_classes().items() if "schema" in kind.asks_for]
            raise ValueError(
                f"evaluation.json_schema_by_task.{task}: no metric reads it; set metric_by_task.{task} to "
                f"{' or '.join(names)}, or remove it"
            )


def _class_of(evaluation: Evaluation, task: str) -> type[Metric]:
    """The metric of a task. Raises ValueError for an unknown metric and a missing schema."""
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


def metric_identity(evaluation: Evaluation, task: str) -> dict[str, JsonValue]:
    """The metric, its settings and its library's version: scores depend on these and on the answers.

    Raises ValueError as `check_names` does, for settings that cannot be read (a schema's file), and for a missing
    library.
    """
    name, kind = evaluation.metric_of(task), _class_of(evaluation, task)
    try:
        identity: dict[str, JsonValue] = {"name": name, **kind.settings(name, evaluation, task)}
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
    """The metric of an identity. Raises ValueError for an invalid schema and a function that cannot be called."""
    return metric_class(identity["name"]).load(identity)


def check_metrics(evaluation: Evaluation, tasks: list[str]) -> None:
    """Raises ValueError now for a metric that would fail later, when it scores the answers."""
    check_names(evaluation)
    for task in tasks:
        identity = metric_identity(evaluation, task)
        try:
            load_metric(identity)
        except ValueError as error:
            raise ValueError(f"{_key(metric_class(evaluation.metric_of(task)), task)}: {error}") from error


def _key(kind: type[Metric], task: str) -> str:
    """The key of the recipe that a metric's settings come from."""
    return f"evaluation.{'json_schema' if 'schema' in kind.asks_for else 'metric'}_by_task.{task}"
