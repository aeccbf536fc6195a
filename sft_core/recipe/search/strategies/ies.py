"""The settings of instance-dependent early stopping; see sft_core/search/strategies/ies.py."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sft_core.recipe.search.strategy import Needs, Strategy, StrategySettings


class IesSettings(StrategySettings):
    """Which rows are left out of an epoch."""

    delta: Annotated[float, Field(ge=0)] = Field(1e-3, description="bend of a row's loss under which it is left out")


STRATEGIES = {"ies": Strategy(Needs(repacks=True), settings=IesSettings, in_every_identity=True)}
