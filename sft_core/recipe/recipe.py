"""The recipe as frozen typed objects, and the checks that need more than one section of it. parse.py reads the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from sft_core.recipe.datasets.dataset import Dataset
from sft_core.recipe.datasets.mixture import DatasetMixture
from sft_core.recipe.evaluation import LM_EVAL, Evaluation
from sft_core.recipe.rank_strategies import STRATEGIES
from sft_core.recipe.search.section import Search
from sft_core.recipe.sections import ChatTemplate, Hub, Model, Packing, PositiveInt, Runtime, Section, Training
from sft_core.recipe.wording import alternatives, nearest
from sft_core.rounds import BASE, ONLY


class Phase(Section):
    """A mixture, its packs, and how they are trained, from the checkpoint of the phase before."""

    dataset_mixture: DatasetMixture
    packing: Packing = Packing()
    training: Training = Training()
    search: Search | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Phase:
        if self.packing.over_long == "split" and self.training.loss_scope == "all":
            raise ValueError("packing.over_long: found 'split'; training.loss_scope all has no turns to cut at")
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
            raise ValueError("trained_token_share: a search trains all rows of a task or none; give weight or num_rows")

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
# A phase names a column of the score table. These are the table's other columns, and the start model's.
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
                f"phases: found the source {repeated[0]!r} in several phases; give each its own name (datasets.name)"
            )
        if len({*self.tasks}) < len(self.tasks):
            raise ValueError(f"evaluation.tasks: found {', '.join(self.tasks)}; name each task once")

    def _check_phase(self, name: str, phase: Phase) -> None:
        batch = phase.training.global_batch_size
        if batch % self.runtime.num_data_ranks:
            raise ValueError(
                f"{self.key_of(name, 'training.global_batch_size')}: found {batch}; it is a multiple of "
                f"{self._batch_divisor()}, so that every rank gets the same number of packs"
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
                f"runtime.distributed: found {self.runtime.distributed!r}; {reason} needs a strategy that holds all "
                f"weights on each rank: {known}"
            )
        for share in ("selection_share", "report_share"):
            value, expected = (getattr(each.dataset_mixture, share) for each in (phase, first))
            if value != expected:
                raise ValueError(
                    f"{self.key_of(name, f'dataset_mixture.{share}')}: found {value:g}, and {expected:g} in the first "
                    "phase; give all phases the same shares, or one trains the prompts that another holds out"
                )

    def _batch_divisor(self) -> str:
        """The number of ranks that get packs of their own, written with the recipe's keys."""
        ranks_a_pack = STRATEGIES[self.runtime.distributed].ranks_a_pack
        divisor = "runtime.num_nodes * runtime.num_processes"
        if ranks_a_pack > 1:
            divisor += f" / {ranks_a_pack}, for {self.runtime.distributed} computes each pack on {ranks_a_pack} ranks"
        return f"{divisor} ({self.runtime.num_data_ranks})"

    def key_of(self, phase: str, key: str) -> str:
        """A phase's key as the user wrote it: at the root where there are no `phases`."""
        return key if [*self.phases] == [ONLY] else f"phases.{phase}.{key}"

    def selection_rows(self, phase: str) -> int | None:
        """How many selection prompts of each source are evaluated while the phase trains; None where none are."""
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
