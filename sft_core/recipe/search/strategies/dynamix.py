"""The settings of DynamixSFT; see sft_core/search/strategies/dynamix.py."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sft_core.recipe.search.strategy import Needs, Strategy, StrategySettings
from sft_core.recipe.sections import PositiveInt, Share


class DynamixSettings(StrategySettings):
    """How tasks are drawn while training goes on."""

    every_steps: PositiveInt = Field(50, description="optimizer steps between two looks at what a step on a task gains")
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(0.3, description="share of draws that are uniform over tasks")
    alpha: Share = Field(0.95, description="how much of a task's value stays when it is looked at again")
    beta: Annotated[float, Field(ge=0)] = Field(5.0, description="how sharply draws follow the values")


# A task is drawn by the pack, and its gain is measured on each rank by itself.
STRATEGIES = {
    "dynamix": Strategy(
        Needs(packs_by_source=True, whole_weights=True), settings=DynamixSettings, in_every_identity=True
    )
}
