"""evaluate: base and tuned model on one task, on the same rows by the same code."""

from __future__ import annotations

from sft_core.evaluate import tasks
from sft_core.pins.pinned import PinnedRecipe
from sft_core.rounds import BASE
from sft_core.store.stage import Needs, Part, Section, Stage
from sft_core.store.store import Store
from steps.download import CONVERSATIONS
from steps.metrics import scoring_of_answers, wants_conversation
from steps.tokenize import TOKENS
from steps.train import MODEL, TRAINED, checkpoint_of


def _section(pinned: PinnedRecipe, part: Part) -> Section:
    recipe, phase = pinned.recipe, pinned.phase(part)
    sampling = recipe.evaluation.sampling
    return {
        "model": pinned.model_identity if part["model"] == BASE else None,
        "tokenizer": pinned.tokenizer_identity,
        "attn_implementation": recipe.model.attn_implementation,
        **how_loaded(pinned),
        "selection_share": phase.dataset_mixture.selection_share,
        "report_share": phase.dataset_mixture.report_share,
        "max_rows": recipe.evaluation.max_rows,
        "max_length": phase.packing.max_length,
        "smoke": recipe.limit is not None,
        **scoring_of_answers(pinned, part["task"]),
        "sampling": None if sampling is None else sampling.model_dump(mode="json"),
        **({} if recipe.evaluation.engine == "transformers" else {"engine": recipe.evaluation.engine}),
    }


def how_loaded(pinned: PinnedRecipe) -> Section:
    """How every model is loaded, so that scores compare: the last phase's precision, the first phase's seed.

    The first phase drew the random weights, so its seed draws them again.
    """
    first = next(iter(pinned.recipe.phases.values()))
    return {"bf16": pinned.recipe.last_phase.training.bf16, "seed": first.training.seed}


def scored_model(pinned: PinnedRecipe, part: Part) -> Needs:
    """The checkpoint that an evaluation loads; empty for the start model, which the recipe names."""
    return {} if part["model"] == BASE else {"trained": checkpoint_of(pinned, part["model"])}


def _needs(pinned: PinnedRecipe, part: Part) -> Needs:
    needs: Needs = {"tokens": (TOKENS, {"source": part["task"]})}
    if wants_conversation(pinned, part["task"]):
        needs["conversations"] = (CONVERSATIONS, {"source": part["task"]})
    return needs | scored_model(pinned, part)


LIBRARIES = ("torch", "transformers", "vllm", "math-verify")

# The version stands for sft_core/evaluate: raise it when a change there changes a score.
EVALUATED = Stage(
    "evaluated",
    tasks.build_evaluated,
    section=_section,
    loaders=lambda pinned, part: {
        "model": pinned.model_loader if part["model"] == BASE else None,
        "tokenizer": pinned.tokenizer_loader,
    },
    needs=_needs,
    reads={TRAINED.name: MODEL},
    version=5,
    libraries=LIBRARIES,
)


def measure_ahead(store: Store, pinned: PinnedRecipe, part: Part) -> None:
    """See tasks.measure_ahead."""
    inputs = {
        name: store.path(store.ensure(stage, pinned, **needed))
        for name, (stage, needed) in _needs(pinned, part).items()
    }
    task = tasks.ScoredTask.from_section({**_section(pinned, part), **EVALUATED.loaders(pinned, part)})
    tasks.measure_ahead(pinned.recipe.runtime, inputs, task)
