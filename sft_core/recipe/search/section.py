"""The section `search` of a recipe: the keys of every search, and the settings of each strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import Field, JsonValue, create_model, model_validator

from sft_core.recipe.search.registry import STRATEGIES
from sft_core.recipe.search.strategy import Needs, StrategySettings
from sft_core.recipe.sections import PositiveInt, Section


class SearchKeys(Section):
    """Which tasks train how long: a roll-out starts from a checkpoint of another; the selection split decides."""

    strategy: str = Field(description="what proposes the roll-outs: docs/search.md")
    epochs_per_rollout: Annotated[float, Field(gt=0)] = Field(1.0, description="passes over the rows that are trained")
    evaluations_per_epoch: PositiveInt = Field(4, description="how often an epoch every task is measured")
    max_rows: PositiveInt = Field(200, description="unique selection prompts of each source, at most")
    score: Literal["loss", "answers"] = Field(
        "loss", description="of a selection row: minus its loss, or what the greedy answer scores by the task's metric"
    )

    @model_validator(mode="after")
    def _no_idle_key(self) -> SearchKeys:
        others = [key for name in STRATEGIES if name != self.strategy for key in _keys_of(name)]
        for key in others:
            if key in self.model_fields_set:
                raise ValueError(f"{key}: {self.strategy} does not know it; remove it")
        return self

    @property
    def needs(self) -> Needs:
        return STRATEGIES[self.strategy].needs

    @property
    def settings(self) -> StrategySettings:
        """The settings of the strategy."""
        strategy = STRATEGIES[self.strategy]
        if strategy.settings is None:
            return StrategySettings()
        return cast("StrategySettings", self if strategy.is_flat else getattr(self, self.strategy))

    @property
    def title(self) -> str:
        """The strategy, and which variant of it."""
        variant = self.settings.variant
        return self.strategy if variant is None else f"{self.strategy} ({variant})"

    @property
    def identity(self) -> dict[str, JsonValue]:
        """The keys on which a roll-out depends, as JSON."""
        left_out: dict[str, bool | set[str]] = {}
        for name, strategy in STRATEGIES.items():
            if name != self.strategy and not strategy.in_every_identity:
                left_out |= dict.fromkeys(_keys_of(name), True)
            elif strategy.caps:
                left_out |= dict.fromkeys(strategy.caps, True) if strategy.is_flat else {name: {*strategy.caps}}
        return self.model_dump(mode="json", exclude=left_out)


def _keys_of(name: str) -> list[str]:
    """The keys of `search` that a strategy owns."""
    strategy = STRATEGIES[name]
    if strategy.settings is None:
        return []
    return list(strategy.settings.model_fields) if strategy.is_flat else [name]


if TYPE_CHECKING:
    Search = SearchKeys
else:
    Search = create_model(
        "Search",
        __base__=(*(strategy.settings for strategy in STRATEGIES.values() if strategy.is_flat), SearchKeys),
        __doc__=SearchKeys.__doc__,
        strategy=(Literal[tuple(STRATEGIES)], SearchKeys.model_fields["strategy"]),
        **{
            name: (strategy.settings, strategy.settings())
            for name, strategy in STRATEGIES.items()
            if strategy.settings is not None and not strategy.is_flat
        },
    )
