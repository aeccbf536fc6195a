"""The recipe: one YAML file as frozen typed objects; a value that is not understood is an error, never ignored.

Every message names the key, what was found and what is allowed.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from sft_core.measuring import LM_EVAL, Evaluation
from sft_core.search_settings.section import Search
from sft_core.sections import (
    ChatTemplate,
    Dataset,
    DatasetMixture,
    Hub,
    Model,
    Packing,
    PositiveInt,
    Runtime,
    Section,
    Training,
)
from sft_core.wording import nearest, short

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    model: Model
    chat_template: ChatTemplate = ChatTemplate()
    dataset_mixture: DatasetMixture
    packing: Packing = Packing()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    search: Search | None = None
    runtime: Runtime = Runtime()
    hub: Hub | None = Field(None, description="where the result is pushed to; default: nowhere")
    limit: PositiveInt | None = Field(None, description="only the first rows of each source: a smoke run")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if len({*self.tasks}) < len(self.tasks):
            raise ValueError(f"evaluation.tasks: found {', '.join(self.tasks)}; name each task once")
        for key in ("tasks", "max_new_tokens_by_task", "metric_by_task", "json_schema_by_task"):
            for name in getattr(self.evaluation, key) or ():
                if name not in self.sources:
                    raise ValueError(f"evaluation.{key}: found {name!r}; it is no source{nearest(name, self.sources)}")
        if self.training.global_batch_size % self.runtime.num_ranks:
            raise ValueError(
                f"training.global_batch_size: found {self.training.global_batch_size}; it is a multiple of "
                f"runtime.num_nodes * runtime.num_processes ({self.runtime.num_ranks}), so that every rank gets as "
                "many packs"
            )
        if self.packing.over_long == "split" and self.training.loss_scope == "all":
            raise ValueError("packing.over_long: found 'split'; training.loss_scope all knows no turns to cut at")
        if self.selection_rows is not None and self.dataset_mixture.selection_share == 0:
            key = "search" if self.search is not None else "evaluation.during_training"
            raise ValueError(
                f"{key}: no prompt is in the selection split; give dataset_mixture.selection_share more than 0"
            )
        if self.search is not None:
            self._check_search(self.search)
        if self.packing.max_length < 2:
            raise ValueError("packing.max_length: found 1; a pack holds at least 2 tokens")
        return self

    def _check_search(self, search: Search) -> None:
        training = self.training
        for key in ("num_train_epochs", "max_steps"):
            if key in training.model_fields_set:
                raise ValueError(f"training.{key}: a search trains search.epochs_per_rollout at a time; remove it")
        if training.lr_scheduler_type not in ("constant", "constant_with_warmup") and not search.needs.any_scheduler:
            raise ValueError(
                f"training.lr_scheduler_type: found {training.lr_scheduler_type!r}; a search does not know how long it "
                "will train: constant, or constant_with_warmup at the start of each roll-out"
            )
        wanting = search.strategy if search.needs.whole_weights else "search.score answers"
        if (search.needs.whole_weights or search.score == "answers") and self.runtime.distributed != "ddp":
            raise ValueError(
                f"runtime.distributed: found {self.runtime.distributed!r}; {wanting} works on each rank by itself, for "
                "which it holds all weights: ddp"
            )
        if training.lora is not None:
            raise ValueError("training.lora: a search goes back to whole checkpoints; remove search or lora")
        if self.evaluation.during_training is not None:
            raise ValueError("evaluation.during_training: a search evaluates by itself; remove it")
        if self.dataset_mixture.datasets[0].trained_token_share is not None:
            raise ValueError("trained_token_share: a search trains a task's rows or does not; give weights or num_rows")

    @property
    def selection_rows(self) -> int | None:
        """Selection prompts of each source that are evaluated while training goes on; None: there are none."""
        if self.search is not None:
            return self.search.max_rows
        during = self.evaluation.during_training
        return None if during is None else during.max_rows

    @property
    def sources(self) -> list[str]:
        return [dataset.source for dataset in self.dataset_mixture.datasets]

    @property
    def tasks(self) -> list[str]:
        return list(self.evaluation.tasks if self.evaluation.tasks is not None else self.sources)

    @property
    def scored(self) -> list[str]:
        """All that the report scores: the tasks, and those of the lm-evaluation-harness, with a prefix."""
        lm_eval = self.evaluation.lm_eval
        return [*self.tasks, *(f"{LM_EVAL}{name}" for name in (lm_eval.tasks if lm_eval else ()))]

    def dataset(self, source: str) -> Dataset:
        return next(dataset for dataset in self.dataset_mixture.datasets if dataset.source == source)


def read_yaml(text: str) -> dict[str, Any]:
    """YAML 1.2 text as plain JSON-able data: `1e-5` is a number, a key that stands twice is an error."""
    data = _plain(text, "the recipe")
    if not isinstance(data, dict):
        raise ValueError(f"a recipe is a mapping of sections; found {type(data).__name__}")
    return data


def _plain(text: str, name: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return json.loads(json.dumps(YAML(typ="safe", pure=True).load(io.StringIO(text)), default=str))
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from None


def parse_recipe(data: dict[str, Any]) -> Recipe:
    """The typed recipe of plain data. Raises ValueError that lists every wrong key."""
    try:
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = error.errors()
        # A list whose members are faulty is also called too short; that tells nobody anything.
        told = [p for p in problems if p["type"] != "too_short" or not any(_is_inside(q, p) for q in problems)]
        raise ValueError("\n".join(_explain(problem) for problem in told)) from None


def load_recipe(path: str | Path, *, overrides: tuple[str, ...] = (), limit: int | None = None) -> Recipe:
    """The recipe in a YAML file, with `key=value` overrides and a row limit applied.

    Raises ValueError for a wrong key or value and FileNotFoundError for a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe (looked in {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a recipe is UTF-8 text; byte {error.start} is not") from None
    return parse_recipe(override(read_yaml(text), overrides, limit))


def override(data: dict[str, Any], overrides: tuple[str, ...], limit: int | None = None) -> dict[str, Any]:
    """A copy of the data with `section.key=value` set (values are YAML; a source by its name or index).

    >>> override({"training": {"seed": 1}}, ("training.learning_rate=1e-5",))
    {'training': {'seed': 1, 'learning_rate': 1e-05}}
    """
    data = json.loads(json.dumps(data))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text}: expected section.key=value, for example training.learning_rate=1e-5")
        node: Any = data
        *parents, last = _parts(key.strip(), data)
        for parent in parents:
            node = _child(node, parent, text)
        if isinstance(node, list):
            raise ValueError(f"--set {text}: {parents[-1]} is a list; name the element and its key")
        if not isinstance(node, dict):
            raise ValueError(f"--set {text}: {last!r} is below a value that holds no keys")
        node[last] = _plain(value, f"--set {text}: the value") if value.strip() else None
    if limit is not None:
        data["limit"] = limit
    return data


def _parts(key: str, data: dict[str, Any]) -> list[str]:
    """The key cut at its dots, but for those in a source's name, as in OpenHermes_2.5."""
    mixture = data.get("dataset_mixture")
    datasets = mixture.get("datasets") if isinstance(mixture, dict) else None
    names = [_source_of(element) for element in datasets] if isinstance(datasets, list) else []
    pieces, parts = key.split("."), []
    while pieces:
        size = next((n for n in range(len(pieces), 1, -1) if ".".join(pieces[:n]) in names), 1)
        parts.append(".".join(pieces[:size]))
        pieces = pieces[size:]
    return parts


def _child(node: Any, name: str, text: str) -> Any:
    if isinstance(node, list):
        for index, element in enumerate(node):
            if name in (str(index), _source_of(element)):
                return element
        raise ValueError(f"--set {text}: no element {name!r}; use a source's name or its index from 0")
    if not isinstance(node, dict):
        raise ValueError(f"--set {text}: {name!r} is below a value that holds no keys")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _source_of(element: Any) -> str | None:
    """The name of a dataset in plain data; one that is faulty still answers to the name it states."""
    with contextlib.suppress(ValidationError):
        return Dataset.model_validate_json(json.dumps(element)).source
    return element.get("name") if isinstance(element, dict) else None


def _is_inside(problem: ErrorDetails, outer: ErrorDetails) -> bool:
    depth = len(outer["loc"])
    return len(problem["loc"]) > depth and problem["loc"][:depth] == outer["loc"]


def _explain(problem: ErrorDetails) -> str:
    where, fields = _locate(problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(str(problem['loc'][-1]), fields)}"
    if problem["type"] == "missing":
        return f"{where}: missing; it has no default"
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where or 'the recipe'}: found {short(problem['input'])}; {message[0].lower()}{message[1:]}"


_UNION_MEMBERS = ("str", "tuple[str, ...]")  # pydantic puts them into a place; they are no keys


def _locate(loc: tuple[str | int, ...]) -> tuple[str, list[str]]:
    """The key in a user's words, and the names that are known where its last part stands."""
    where = ""
    model: type[BaseModel] | None = Recipe
    fields = list(Recipe.model_fields)
    for part in loc:
        if isinstance(part, int):
            where += f"[{part}]"
            continue
        if part in _UNION_MEMBERS:
            continue
        where += f".{part}" if where else str(part)
        fields = list(model.model_fields) if model is not None else []
        field = model.model_fields.get(part) if model is not None else None
        model = _section_of(field.annotation) if field is not None else None
        if model is not None and part != loc[-1]:
            fields = list(model.model_fields)
    return where, fields


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)
