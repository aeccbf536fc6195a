"""The settings of mSFT; see sft_core/search/strategies/msft.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sft_core.recipe.search.strategy import Strategy, StrategySettings
from sft_core.recipe.sections import PositiveInt

OF_ROBUST = ("alpha", "readmit", "max_kept")


class MsftSettings(StrategySettings):
    preset: Literal["robust", "paper"] = Field("robust", description="msft: knows noise, or exactly as published")
    max_rollouts: PositiveInt = Field(10, description="msft: a larger one goes on where a smaller one ended")
    max_epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="msft: epochs that were kept, in all")
    max_idle: PositiveInt | None = Field(None, description="msft: roll-outs in a row without a task dropped")
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="robust: chance of a drop that is none")
    readmit: bool = Field(False, description="robust: a dropped task comes back when it is forgotten")
    max_kept: Annotated[int, Field(ge=3)] | None = Field(
        None, description="robust: evaluations of a roll-out whose weights are on the disk at once; default: as needed"
    )

    @model_validator(mode="after")
    def _preset_knows_its_keys(self) -> MsftSettings:
        for key in OF_ROBUST:
            if self.preset == "paper" and key in self.model_fields_set:
                raise ValueError(f"{key}: msft, preset paper does not know it; remove it")
        return self

    @property
    def variant(self) -> str:
        return self.preset

    @property
    def test(self) -> str | None:
        return "student_t" if self.preset == "robust" else None

    @property
    def weights_at_once(self) -> int | None:
        return self.max_kept


STRATEGIES = {
    "msft": Strategy(
        settings=MsftSettings, is_flat=True, caps=("max_rollouts", "max_epochs", "max_idle"), in_every_identity=True
    )
}
