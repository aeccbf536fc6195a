"""What recipes ask of packs and of training keeps its identity: a new digest would train again what is in the store."""

from typing import Any

import pytest

from sft_core.pins.pinned import PinnedRecipe
from sft_core.recipe.parse import load_recipe, parse_recipe
from sft_core.recipe.recipe import Recipe
from sft_core.rounds import ONLY, Point, Rollout, Rounds
from sft_core.store.manifest import sha256_of
from steps.pack import PACKED
from steps.train import TRAINED
from tests.search.test_searching import recipe
from tests.train.tiny import ROOT

# Of each recipe: the section of packs, and that of each round of training. Written down before strategies owned their
# settings; a change here needs a reason that is worth training everything again.
# (smollm3 and tulu3-8b ask for attention by `auto`, where they asked for flash_attention_2: nobody had run them.)
# (The preset robust names its test since that is Student's: another test keeps other weights.)
SECTIONS = {
    "quickstart": ("d6864d53e47bd15a", "0d88e904682171e0"),
    "smollm2-135m": ("6222895b77f27fd9", "5ee70ca8cacc039c"),
    "smollm3": ("96f950295c749e2c", "94fc87aee5083446", "92b8e3c9a33de14f", "df1e17b84cef9445"),  # of each phase
    "tulu3-8b": ("63ec8fb343c8ba87", "8ff46e769f202349"),
    "msft-quickstart": ("d6864d53e47bd15a", "2d424666ca4b0c5a", "8541aa4a214bc2c8"),
    "msft-paper": ("5ffcb8cf89c4f751", "bc9f31138aca10e6", "047f8aa8fc473431"),
}
SEARCHES: list[tuple[dict[str, Any], tuple[str, str, str]]] = [
    ({"strategy": "sft"}, ("cb16162cfb0f1b01", "d6a31b77045bad89", "28a91a9a9f1bcf6f")),
    ({"strategy": "msft"}, ("cb16162cfb0f1b01", "63ee40a9c8c1d75e", "22c72206f10ccd5b")),
    (
        {"strategy": "msft", "preset": "robust", "alpha": 0.1, "readmit": True, "max_kept": 4},
        ("cb16162cfb0f1b01", "90bf7950b7770a85", "6c81df99ecbab612"),
    ),
    ({"strategy": "continual"}, ("cb16162cfb0f1b01", "437af66c861b44b1", "0d622dd62d0d83c2")),
    ({"strategy": "sro"}, ("cb16162cfb0f1b01", "d76012da66fd3829", "5718d8b0f037b931")),
    ({"strategy": "soft_sro"}, ("cb16162cfb0f1b01", "3958b42d0c76cf4c", "369b389103be782a")),
    ({"strategy": "dynamix"}, ("829673c1fd76cac4", "335f0b6f587c8d87", "9dfafe8cb913a2be")),
    ({"strategy": "ies"}, ("cb16162cfb0f1b01", "c12d763ef771b16d", "549f7349933a645c")),
]


def digests(recipe: Recipe) -> tuple[str, ...]:
    names = {"tokenizer": "b" * 40, "model": "e" * 40, "template": "c" * 64}
    pins = {"sources": {source: "a" * 40 for source in recipe.sources}, **names}
    pinned, rounds = PinnedRecipe(recipe, pins), [0]
    if recipe.last_phase.search is not None:
        tasks = tuple(recipe.last_phase.dataset_mixture.trained_sources)
        second = Rollout(1, Point(0, 3), tasks[:1], 1.5, {tasks[0]: 7})
        sizes = {task: 10 + place for place, task in enumerate(tasks)}
        searched = Rounds((Rollout(0, None, tasks, 2.0), second), sizes=sizes)
        pinned = PinnedRecipe(recipe, pins, rounds={ONLY: searched})
        rounds = [0, 1]
    sections = [
        section
        for phase in recipe.phases
        for section in (
            PACKED.section(pinned, pinned.part_of(phase)),
            *(TRAINED.section(pinned, pinned.part_of(phase, round=number)) for number in rounds),
        )
    ]
    return tuple(sha256_of(section)[:16] for section in sections)


@pytest.mark.parametrize("name", SECTIONS)
def test_section_of_a_recipe_is_what_it_was(name: str) -> None:
    assert digests(load_recipe(ROOT / "configs" / f"{name}.yaml")) == SECTIONS[name]


@pytest.mark.parametrize(("search", "expected"), SEARCHES, ids=str)
def test_section_of_a_search_is_what_it_was(search: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert digests(parse_recipe(recipe(**search))) == expected


def test_caps_are_no_part_of_a_rollout() -> None:
    plain, capped = (parse_recipe(recipe(max_rollouts=number, max_idle=number)) for number in (2, 7))
    assert digests(plain) == digests(capped)
