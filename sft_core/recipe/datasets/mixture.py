"""The section dataset_mixture: the datasets, how much of each is trained, and which prompts are held out."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from sft_core.recipe.datasets.union import AnyDataset
from sft_core.recipe.sections import PositiveInt, Section, Seed, Share

RESERVED = ("mixture", "packs", "selection", "duplicates")  # names of inputs that stages read beside the sources


class Deduplication(Section):
    """Training rows that repeat an earlier row are left out; the first in the order of datasets is kept."""

    near: bool = Field(True, description="also rows that are nearly the same; false: the same but for white space")
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="shared word n-grams (Jaccard) of prompt and of answer from which on rows are near duplicates"
    )
    ngram: PositiveInt = Field(5, description="words of an n-gram")
    num_permutations: Annotated[int, Field(ge=16, le=4096)] = Field(128, description="of a MinHash signature")


class Decontamination(Section):
    """Training rows that hold a prompt of the report split of an evaluation task are left out."""

    ngram: PositiveInt = Field(8, description="words of an n-gram")
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of a prompt's words in n-grams that the row holds as well, from which on it is left out"
    )
    common_share: Share = Field(
        0.02, description="n-grams in more of a task's prompts are its wording, not a question; 1: all count"
    )


class DatasetMixture(Section):
    """The sources, how much of each is trained on, and how prompts are held out."""

    datasets: Annotated[tuple[AnyDataset, ...], Field(min_length=1, description="the sources of conversations")]
    seed: Seed = Field(0, description="of the draw of each source's rows, and of their order")
    selection_share: Share = Field(0.02, description="share of prompts for decisions during training")
    report_share: Share = Field(0.05, description="share of prompts for the scores that are reported")
    max_rejected_share: Share = Field(0.05, description="a source with more bad rows than this fails")
    num_trained_tokens: PositiveInt | None = Field(
        None, description="with trained_token_share: of an epoch; default: what the datasets with a share hold once"
    )
    max_repeats: Annotated[float, Field(gt=0)] = Field(
        4.0, description="with trained_token_share: how often a row is repeated in an epoch, at most"
    )
    deduplication: Deduplication | None = None
    decontamination: Decontamination | None = None

    @model_validator(mode="after")
    def _consistent(self) -> DatasetMixture:
        names = [dataset.source for dataset in self.datasets]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two datasets are called {repeated[0]!r}; give each its own name")
        if reserved := sorted({*names}.intersection(RESERVED)):
            raise ValueError(f"a dataset is called {reserved[0]!r}, as an output of the flow is; give it another name")
        if self.selection_share + self.report_share >= 1:
            raise ValueError("selection_share + report_share leave nothing to train on; their sum must be under 1")
        without_share = [dataset.source for dataset in self.datasets if dataset.trained_token_share is None]
        if 0 < len(without_share) < len(names):
            raise ValueError(
                f"trained_token_share is missing for {', '.join(without_share)}; give it to every dataset (0 leaves "
                "one out)"
            )
        if not without_share and not any(dataset.trained_token_share for dataset in self.datasets):
            raise ValueError("every trained_token_share is 0; give one of them more")
        if without_share and self.num_trained_tokens is not None:
            raise ValueError("num_trained_tokens needs a trained_token_share for every dataset")
        return self

    @property
    def trained_sources(self) -> list[str]:
        """The names of the datasets that are not left out by a weight or a share of 0."""
        return [dataset.source for dataset in self.datasets if 0 not in (dataset.weight, dataset.trained_token_share)]
