"""The recipe: one YAML file as frozen typed objects. A value that is not understood is an error, never ignored.

Every message names the key, the value found there and the values allowed.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from sft_core.recipe.datasets.dataset import Dataset
from sft_core.recipe.datasets.mixture import DatasetMixture
from sft_core.recipe.datasets.union import (
    NO_KIND,
    TAGS,
    explain_foreign_key,
    explain_no_kind,
    parse_dataset,
    without_idle_keys,
)
from sft_core.recipe.evaluation import LM_EVAL, Evaluation
from sft_core.recipe.rank_strategies import STRATEGIES
from sft_core.recipe.search.section import Search
from sft_core.recipe.sections import ChatTemplate, Hub, Model, Packing, PositiveInt, Runtime, Section, Training
from sft_core.recipe.wording import alternatives, nearest, short
from sft_core.rounds import BASE, ONLY

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Phase(Section):
    """A link of the chain: a mixture, its packs, and how they are trained. It starts from the checkpoint before it."""

    dataset_mixture: DatasetMixture
    packing: Packing = Packing()
    training: Training = Training()
    search: Search | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Phase:
        if self.packing.over_long == "split" and self.training.loss_scope == "all":
            raise ValueError("packing.over_long: found 'split'; training.loss_scope all knows no turns to cut at")
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
        if training.lora is not None:
            raise ValueError("training.lora: a search goes back to whole checkpoints; remove search or lora")
        if self.dataset_mixture.datasets[0].trained_token_share is not None:
            raise ValueError("trained_token_share: a search trains a task's rows or does not; give weights or num_rows")

    @property
    def sources(self) -> list[str]:
        return [dataset.source for dataset in self.dataset_mixture.datasets]


class PhaseRecipe(NamedTuple):
    """What the training of one phase reads of a recipe."""

    model: Model
    dataset_mixture: DatasetMixture
    packing: Packing
    training: Training
    search: Search | None
    runtime: Runtime


PHASE_KEYS = tuple(Phase.model_fields)
# What a row of the score table holds beside a column for each model.
RESERVED_NAMES = frozenset({BASE, "task", "metric", "n", "stderr", "difference", "low", "high", "flags"})
PhaseName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", description="of the recipe: letters, digits, . _ -")]
    model: Model
    chat_template: ChatTemplate = ChatTemplate()
    phases: Annotated[dict[PhaseName, Phase], Field(min_length=1)] = Field(
        description="one after another, each from the checkpoint of the one before; a recipe of one phase may have the "
        "phase's keys at its root instead"
    )
    evaluation: Evaluation = Evaluation()
    runtime: Runtime = Runtime()
    hub: Hub | None = Field(None, description="where the result is pushed to; default: nowhere")
    limit: PositiveInt | None = Field(None, description="only the first rows of each source: a smoke run")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self._check_names()
        for key in ("tasks", "max_new_tokens_by_task", "metric_by_task", "json_schema_by_task"):
            for name in getattr(self.evaluation, key) or ():
                if name not in self.sources:
                    raise ValueError(f"evaluation.{key}: found {name!r}; it is no source{nearest(name, self.sources)}")
        for name, phase in self.phases.items():
            self._check_phase(name, phase)
        if self.evaluation.during_training is not None and all(phase.search for phase in self.phases.values()):
            raise ValueError("evaluation.during_training: a search evaluates by itself; remove it")
        return self

    def _check_names(self) -> None:
        if taken := RESERVED_NAMES.intersection(self.phases):
            raise ValueError(f"phases.{min(taken)}: the name is taken; choose another")
        if repeated := [source for source, count in Counter(self.sources).items() if count > 1]:
            raise ValueError(
                f"phases: found the source {repeated[0]!r} in several; give each a name of its own (datasets.name)"
            )
        if len({*self.tasks}) < len(self.tasks):
            raise ValueError(f"evaluation.tasks: found {', '.join(self.tasks)}; name each task once")

    def _check_phase(self, name: str, phase: Phase) -> None:
        batch = phase.training.global_batch_size
        if batch % self.runtime.num_data_ranks:
            raise ValueError(
                f"{self.key_of(name, 'training.global_batch_size')}: found {batch}; it is a multiple of "
                f"{self._batch_divisor()}, so that every rank gets as many packs"
            )
        if self.selection_rows(name) is not None and phase.dataset_mixture.selection_share == 0:
            key = self.key_of(name, "search") if phase.search is not None else "evaluation.during_training"
            raise ValueError(
                f"{key}: no prompt is in the selection split; give "
                f"{self.key_of(name, 'dataset_mixture.selection_share')} more than 0"
            )
        search, first = phase.search, next(iter(self.phases.values()))
        wants_whole_model = search is not None and (search.needs.whole_weights or search.score == "answers")
        if search is not None and wants_whole_model and not STRATEGIES[self.runtime.distributed].holds_all:
            reason = search.strategy if search.needs.whole_weights else "search.score answers"
            known = alternatives(name for name, strategy in STRATEGIES.items() if strategy.holds_all)
            raise ValueError(
                f"runtime.distributed: found {self.runtime.distributed!r}; {reason} works on each rank by itself, for "
                f"which it holds all weights: {known}"
            )
        for share in ("selection_share", "report_share"):
            value, expected = (getattr(each.dataset_mixture, share) for each in (phase, first))
            if value != expected:
                raise ValueError(
                    f"{self.key_of(name, f'dataset_mixture.{share}')}: found {value:g}, and {expected:g} in the first "
                    "phase; the shares are the same in all phases, so that what one holds out no other trains"
                )

    def _batch_divisor(self) -> str:
        """What the global batch is divided by, in the recipe's words."""
        ranks_a_pack = STRATEGIES[self.runtime.distributed].ranks_a_pack
        divisor = "runtime.num_nodes * runtime.num_processes"
        if ranks_a_pack > 1:
            divisor += f" / {ranks_a_pack}, for {self.runtime.distributed} computes each pack on {ranks_a_pack} ranks"
        return f"{divisor} ({self.runtime.num_data_ranks})"

    def key_of(self, phase: str, key: str) -> str:
        """A phase's key as the user wrote it: at the root where there are no `phases`."""
        return key if [*self.phases] == [ONLY] else f"phases.{phase}.{key}"

    def selection_rows(self, phase: str) -> int | None:
        """Selection prompts of each source that are evaluated while the phase trains; None: there are none."""
        search, during = self.phases[phase].search, self.evaluation.during_training
        if search is not None:
            return search.max_rows
        return None if during is None else during.max_rows

    @property
    def models(self) -> list[str]:
        """The names of all models that are scored: the start model, and the checkpoint of each phase."""
        return [BASE, *self.phases]

    @property
    def last_phase(self) -> Phase:
        """The phase whose checkpoint is released."""
        return [*self.phases.values()][-1]

    @property
    def datasets(self) -> list[Dataset]:
        return [dataset for phase in self.phases.values() for dataset in phase.dataset_mixture.datasets]

    @property
    def sources(self) -> list[str]:
        return [dataset.source for dataset in self.datasets]

    @property
    def tasks(self) -> list[str]:
        return list(self.evaluation.tasks if self.evaluation.tasks is not None else self.sources)

    @property
    def scored(self) -> list[str]:
        """All that the report scores: the tasks, and those of the lm-evaluation-harness, with a prefix."""
        lm_eval = self.evaluation.lm_eval
        return [*self.tasks, *(f"{LM_EVAL}{name}" for name in (lm_eval.tasks if lm_eval else ()))]

    @property
    def has_search(self) -> bool:
        """Whether a phase has a search."""
        return any(phase.search is not None for phase in self.phases.values())

    def dataset(self, source: str) -> Dataset:
        return next(dataset for dataset in self.datasets if dataset.source == source)

    def for_phase(self, name: str) -> PhaseRecipe:
        phase = self.phases[name]
        keys = (phase.dataset_mixture, phase.packing, phase.training, phase.search)
        return PhaseRecipe(self.model, *keys, self.runtime)

    def phase_of(self, source: str) -> str:
        """The name of the phase whose mixture has the source."""
        return next(name for name, phase in self.phases.items() if source in phase.sources)

    def as_written(self, exclude: Iterable[str] = ()) -> dict[str, Any]:
        """Plain data with every default, and a phase's keys at the root where the recipe has no `phases`."""
        data = self.model_dump(mode="json", exclude={*exclude})
        if [*self.phases] != [ONLY]:
            return data
        return {
            key: value
            for name, section in data.items()
            for key, value in (section[ONLY].items() if name == "phases" else [(name, section)])
        }


# The keys of a recipe of one phase, in the order in which a person reads them.
ROOT_KEYS = [key for name in Recipe.model_fields for key in (PHASE_KEYS if name == "phases" else (name,))]


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
        return Recipe.model_validate_json(json.dumps(_without_idle_keys(with_phases(data))))
    except ValidationError as error:
        problems = error.errors()
        # pydantic also calls a list too short when its members are faulty, which helps nobody.
        shown = [p for p in problems if p["type"] != "too_short" or not any(_is_inside(q, p) for q in problems)]
        raise ValueError("\n".join(_explain(problem, "phases" in data) for problem in shown)) from None


def with_phases(data: dict[str, Any]) -> dict[str, Any]:
    """The data with its phase's keys below `phases`, which is how everything after this reads them.

    Raises ValueError for such a key beside `phases`.
    """
    at_root = [key for key in PHASE_KEYS if key in data]
    if "phases" not in data:
        rest = {key: value for key, value in data.items() if key not in at_root}
        return {**rest, "phases": {ONLY: {key: data[key] for key in at_root}}}
    if at_root:
        raise ValueError(f"{at_root[0]}: found beside phases; each phase has its own: phases.NAME.{at_root[0]}")
    return data


def _without_idle_keys(data: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(data["phases"], dict):
        return data
    return {**data, "phases": {name: _phase_without_idle_keys(phase) for name, phase in data["phases"].items()}}


def _phase_without_idle_keys(phase: Any) -> Any:
    mixture = phase.get("dataset_mixture") if isinstance(phase, dict) else None
    if not isinstance(mixture, dict) or not isinstance(mixture.get("datasets"), list):
        return phase
    datasets = [without_idle_keys(dataset) for dataset in mixture["datasets"]]
    return {**phase, "dataset_mixture": {**mixture, "datasets": datasets}}


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
    phases = data.get("phases")
    names = []
    for phase in [data, *(phases.values() if isinstance(phases, dict) else ())]:
        mixture = phase.get("dataset_mixture") if isinstance(phase, dict) else None
        datasets = mixture.get("datasets") if isinstance(mixture, dict) else None
        names += [_source_of(element) for element in datasets] if isinstance(datasets, list) else []
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
    """The name of a dataset in plain data. A faulty dataset still has the name that it states."""
    with contextlib.suppress(ValidationError):
        return parse_dataset(element).source
    return element.get("name") if isinstance(element, dict) else None


def _is_inside(problem: ErrorDetails, outer: ErrorDetails) -> bool:
    depth = len(outer["loc"])
    return len(problem["loc"]) > depth and problem["loc"][:depth] == outer["loc"]


def _explain(problem: ErrorDetails, has_phases: bool) -> str:
    where, section, fields = _locate(problem["loc"], has_phases)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        foreign = explain_foreign_key(section, key) if section is not None and issubclass(section, Dataset) else None
        return f"{where}: {foreign or f'unknown key{nearest(key, fields)}'}"
    if problem["type"] == NO_KIND:
        unknown, message = explain_no_kind(problem["input"])
        return f"{where}.{unknown}: {message}" if unknown is not None else f"{where}: {message}"
    if problem["type"] == "missing":
        return f"{where}: missing; it has no default"
    if problem["type"] == "value_error":
        is_of_phase = has_phases and len(problem["loc"]) == 2 and problem["loc"][0] == "phases"
        return f"{where}{'.' if is_of_phase else ': '}{message}" if where else message
    return f"{where or 'the recipe'}: found {short(problem['input'])}; {message[0].lower()}{message[1:]}"


_UNION_MEMBERS = ("str", "tuple[str, ...]")  # pydantic puts them into the place of an error; they are no keys


def _locate(loc: tuple[str | int, ...], has_phases: bool) -> tuple[str, type[BaseModel] | None, list[str]]:
    """(key, section, names): the key in a user's words, the section that holds it, and the names known there."""
    where = ""
    holder: type[BaseModel] | None = None
    model: type[BaseModel] | None = Recipe
    fields = [*Recipe.model_fields, *(() if has_phases else PHASE_KEYS)]
    if loc[:1] == ("phases",) and len(loc) > 1:
        where = f"phases.{loc[1]}" if has_phases else ""
        model, loc = Phase, loc[2:]
    for part in loc:
        if isinstance(part, int):
            where += f"[{part}]"
            continue
        if part in TAGS:
            model = TAGS[part]
            fields = list(model.model_fields)
            continue
        if part in _UNION_MEMBERS:
            continue
        where += f".{part}" if where else str(part)
        holder = model
        if model is not Recipe:
            fields = list(model.model_fields) if model is not None else []
        field = model.model_fields.get(part) if model is not None else None
        model = _section_of(field.annotation) if field is not None else None
        if model is not None and part != loc[-1]:
            fields = list(model.model_fields)
    return where, holder, fields


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for arg in get_args(annotation) if (section := _section_of(arg))), None)
