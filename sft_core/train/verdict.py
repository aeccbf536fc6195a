"""The verdict on a training before any work: all that can be tried of it without weights, rows, and its ranks.

Invariant: only a verdict without a fault is an output. The key has the libraries' versions, so an upgrade tries again;
faults are raised, so that whoever mends the machine is not told them once more.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sft_core.counts import Counts
from sft_core.train.job import ModelLoader, TokenizerLoader
from sft_core.train.model_files import check_finite, model_folder

if TYPE_CHECKING:
    from sft_core.recipe.recipe import PhaseRecipe
    from sft_core.recipe.sections import Runtime
    from sft_core.store.stage import Build

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict(Counts):
    """What came out of the trials. attention: what the recipe's choice is for this class and machine."""

    model_type: str
    parameters: int
    trained_parameters: int
    attention: str
    documents_alone: bool  # in a forward of its own each, since the class lets packed documents see each other
    warnings: list[str]

    @property
    def line(self) -> str:
        trained = "all" if self.trained_parameters == self.parameters else f"{self.trained_parameters:,}"
        alone = "each in its own forward" if self.documents_alone else "packed"
        return (
            f"tried: {self.model_type} of {self.parameters:,} parameters, {trained} trained, attention "
            f"{self.attention}, documents {alone}, optimizer and schedule"
        )


def build_verdict(
    build: Build,
    *,
    model: ModelLoader,
    tokenizer: TokenizerLoader,
    recipe: PhaseRecipe,
    device: str,
    libraries: dict[str, str | None],
) -> dict[str, Any]:
    """Writes verdict.json, which is also the counts. Raises ValueError with every fault."""
    verdict = try_training(model, tokenizer, recipe, build.runtime, build.out, here=device != ELSEWHERE)
    counts = {**verdict.to_json(), "device": device, "libraries": libraries}
    (build.out / "verdict.json").write_text(json.dumps(counts, indent=1))
    return counts


ELSEWHERE = "elsewhere"  # of a cluster, where each task may be on another machine


def try_training(
    model: ModelLoader, tokenizer: TokenizerLoader, recipe: PhaseRecipe, runtime: Runtime, folder: Path, *, here: bool
) -> Verdict:
    """Tries everything once. Raises ValueError with every fault, a line each. Takes seconds: imports torch and TRL.

    folder: where a training would write; stays empty. here: this machine trains.
    """
    from sft_core.train.models.fit import check_targets
    from sft_core.train.models.model import skeleton
    from sft_core.train.optimizer_trial import try_optimizer
    from sft_core.train.preflight import try_class

    faults = _Faults()
    names = ("path", "revision", "config", "trust_remote_code")
    loader: dict[str, Any] = {name: getattr(model, name) for name in names}
    config, warnings = _try_config(faults, model, tokenizer)
    shape = trial = trained = None
    if config is not None:
        shape = faults.of(lambda: skeleton(**loader))
        trial = faults.of(lambda: try_class(recipe, loader, here=here))
        warnings += [*(trial.warnings if trial is not None else ()), *_of_length(recipe, config)]
    lora = recipe.training.lora
    if shape is not None:
        parameters = shape.num_parameters()
        trained = parameters if lora is None else faults.of(lambda: check_targets(lora, shape))
    warnings += faults.of(lambda: try_optimizer(recipe.training, runtime, shape, folder, here=here)) or []
    if model.path is not None and (files := model_folder(model.path, model.revision)) is not None:
        faults.of(lambda: check_finite(files))
    faults.check()
    assert config is not None and trial is not None and trained is not None
    return Verdict(
        model_type=config.model_type,
        parameters=parameters,
        trained_parameters=trained,
        attention=trial.attention,
        documents_alone=trial.documents_alone,
        warnings=list(dict.fromkeys(warnings)),
    )


def _try_config(faults: _Faults, model: ModelLoader, tokenizer: TokenizerLoader) -> tuple[Any | None, list[str]]:
    """The config, None where no model can be built of it; and warnings about its keys."""
    from sft_core.data.tokenizer.tokenizer import load_tokenizer
    from sft_core.train.models.fit import check_class, check_heads, check_vocabulary
    from sft_core.train.models.model import read_config

    trust = model.trust_remote_code
    config = faults.of(lambda: read_config(model.path, model.revision, model.config, trust), _in_recipes_words)
    if config is None or not faults.passes(lambda: check_class(config, trust_remote_code=trust)):
        return None, []
    warnings = faults.of(lambda: _check_keys(config, model)) or []
    vocabulary = faults.of(lambda: load_tokenizer(**dataclasses.asdict(tokenizer)))
    if vocabulary is not None:
        added, in_recipe = tokenizer.add_special_tokens, model.config is not None
        faults.of(lambda: check_vocabulary(config, vocabulary, added, in_recipe=in_recipe))
    runs = faults.passes(lambda: check_heads(config, trust_remote_code=trust))
    return config if runs else None, warnings


class _Faults:
    """The faults of trials, of which one does not keep the others from being tried."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def of(self, trial: Callable[[], T], message: Callable[[Exception], str] = str) -> T | None:
        """The trial's answer; None if it fails."""
        try:
            return trial()
        except Exception as error:  # models and libraries raise errors of any type
            self._messages.append(message(error).strip() or repr(error))
            return None

    def passes(self, check: Callable[[], None]) -> bool:
        """Whether the check raises nothing."""
        before = len(self._messages)
        self.of(check)
        return len(self._messages) == before

    def check(self) -> None:
        """Raises ValueError with all of them."""
        messages = list(dict.fromkeys(self._messages))
        if len(messages) > 1:
            raise ValueError("\n".join([f"{len(messages)} faults, each of which ends a training:", *messages]))
        if messages:
            raise ValueError(messages[0])


def _in_recipes_words(error: Exception) -> str:
    """An error of a config, for which transformers knows neither the recipe nor its keys."""
    text = str(error)
    if "trust_remote_code" in text:
        return f"model.trust_remote_code: the model brings its own code; read it, and set true to run it ({text})"
    return f"model: its config cannot be read: {error.__cause__ or text}"  # the cause is what a check of sizes says


def _check_keys(config: Any, model: ModelLoader) -> list[str]:
    """Warnings about a config.json. Raises ValueError for a key of model.config that the class does not know."""
    from transformers import PreTrainedConfig

    from sft_core.train.models.config_keys import check_keys, misspelt_keys

    if not type(config).__module__.startswith("transformers."):
        return []  # a class that the model brings: it knows its keys
    if model.config is not None:
        check_keys(config, model.config)
        return []
    keys, _ = PreTrainedConfig.get_config_dict(str(model.path), revision=model.revision)
    return misspelt_keys(config, keys)


def _of_length(recipe: PhaseRecipe, config: Any) -> list[str]:
    """A warning where a row may be longer than the model's context, which training would refuse."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int) or recipe.packing.max_length <= context:
        return []
    return [
        f"packing.max_length {recipe.packing.max_length}: the model was made for {context} tokens "
        "(max_position_embeddings); training ends at a row that is longer than that"
    ]
