"""A search strategy as a recipe and the stages before training see it; sft_core/search has how it decides."""

from __future__ import annotations

import dataclasses

from sft_core.recipe.sections import Section


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a strategy asks of the recipe and of its outputs."""

    packs_by_source: bool = False  # a pack holds rows of one task alone
    repacks: bool = False  # rows are packed anew while training goes on, to packing.max_length
    sizes: bool = False  # the number of training rows of each task
    whole_weights: bool = False  # each rank holds all weights: runtime.distributed ddp
    any_scheduler: bool = False  # the length of training is known before it: any training.lr_scheduler_type


class StrategySettings(Section):
    """The settings that a strategy owns."""

    @property
    def variant(self) -> str | None:
        """The name of a variant, which tells two searches of one strategy apart on a card."""
        return None

    @property
    def weights_at_once(self) -> int | None:
        """How many evaluations of a roll-out may have their weights on the disk at once; None: as many as needed."""
        return None

    @property
    def test(self) -> str | None:
        """The statistical test that can end a roll-out.

        It is in a roll-out's identity: with another test the search may go on from weights that the roll-out has not
        kept.
        """
        return None


@dataclasses.dataclass(frozen=True)
class Strategy:
    """settings: the section `search.NAME` of a recipe; None: the strategy has none.

    is_flat: the settings are keys of `search` itself. caps: settings that end a search and change no roll-out; they are
    in no roll-out's identity. in_every_identity: the settings are in the identity of every search, whatever its
    strategy, so that outputs of earlier versions keep their keys. A new strategy leaves both at False.
    """

    needs: Needs = Needs()
    settings: type[StrategySettings] | None = None
    is_flat: bool = False
    caps: tuple[str, ...] = ()
    in_every_identity: bool = False
