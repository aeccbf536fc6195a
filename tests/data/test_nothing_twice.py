"""Whatever changes in the mixture, no row is downloaded, rendered or tokenized a second time."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import PinnedRecipe
from steps.mix import MIXTURE as MIXED
from steps.pack import PACKED

OF_A_SOURCE = ("conversations", "rendered", "tokens")


@pytest.fixture
def built(tmp_path: Path):
    """Builds so far of the stages that a source's rows go through, by stage and source."""

    def count() -> Counter[tuple[str, str]]:
        lines = map(json.loads, (tmp_path / "store" / "builds.jsonl").read_text().splitlines())
        return Counter((line["stage"], line["part"]["source"]) for line in lines if line["stage"] in OF_A_SOURCE)

    return count


@pytest.fixture
def sources(write_rows) -> list[dict[str, Any]]:
    def rows(tag: str) -> list[dict[str, Any]]:
        answer = {"role": "assistant", "content": f"{tag} says hi."}
        return [{"messages": [{"role": "user", "content": f"{tag} {n // 2}"}, answer]} for n in range(60)]

    return [{"path": str(write_rows(f"{tag}.jsonl", rows(tag)))} for tag in ("a", "b", "c")]


MIXTURE = {"report_share": 0.2, "selection_share": 0.1}
DEDUPLICATION, DECONTAMINATION = {"deduplication": {}}, {"decontamination": {}}


@pytest.mark.parametrize(
    ("mixture", "dataset", "sections"),
    [
        ({}, {"weight": 0.5}, {}),
        ({}, {"num_rows": 7}, {}),
        ({}, {"trained_token_share": 0.3}, {}),
        ({"num_trained_tokens": 500}, {"trained_token_share": 0.3}, {}),
        ({"max_repeats": 2.0}, {"trained_token_share": 0.3}, {}),
        ({"seed": 1}, {}, {}),
        ({"report_share": 0.1}, {}, {}),
        ({}, {}, {"packing": {"max_length": 64}}),
        (DEDUPLICATION, {}, {}),
        ({"deduplication": {"near": False}}, {}, {}),
        ({"deduplication": {"threshold": 0.6, "ngram": 3, "num_permutations": 64}}, {}, {}),
        (DECONTAMINATION, {}, {}),
        ({"decontamination": {"ngram": 5, "threshold": 0.9}}, {}, {}),
        ({**DEDUPLICATION, **DECONTAMINATION}, {"weight": 2.0}, {}),
    ],
    ids=str,
)
def test_mixture_settings_tokenize_no_row_again(
    sources, pinned, ensure, built, mixture: dict[str, Any], dataset: dict[str, Any], sections: dict[str, Any]
):
    def outputs(recipe: PinnedRecipe) -> list[str]:
        return [ensure(stage, recipe)[1]["ref"] for stage in (MIXED, PACKED)]

    first = outputs(pinned(*sources[:2], mixture=MIXTURE))
    before = built()
    assert before == {(stage, source): 1 for stage in OF_A_SOURCE for source in ("a", "b")}
    changed = pinned(*(one | dataset for one in sources[:2]), mixture=MIXTURE | mixture, **sections)
    assert outputs(changed) != first, "the change is one of the mixture or the packs"
    assert built() == before


@pytest.mark.parametrize("mixture", [{}, DEDUPLICATION, DECONTAMINATION], ids=str)
def test_one_more_source_tokenizes_only_its_own_rows(sources, pinned, ensure, built, mixture: dict[str, Any]):
    ensure(PACKED, pinned(*sources[:2], mixture=MIXTURE | mixture))
    before = built()
    ensure(PACKED, pinned(sources[2], *sources[:2], mixture=MIXTURE | mixture))
    assert built() - before == {(stage, "c"): 1 for stage in OF_A_SOURCE}


def test_without_the_keys_no_stage_of_theirs_is_built(sources, pinned, ensure, tmp_path: Path):
    ensure(PACKED, pinned(*sources, mixture=MIXTURE))
    stages = {json.loads(line)["stage"] for line in (tmp_path / "store" / "builds.jsonl").read_text().splitlines()}
    assert stages == {*OF_A_SOURCE, "mixture", "packed"}


def test_keys_that_leave_nothing_out_change_no_row(write_rows, pinned, ensure, built):
    rows = [
        {"messages": [{"role": role, "content": f"{role} {n}"} for role in ("user", "assistant")]} for n in range(40)
    ]
    source = {"path": str(write_rows("distinct.jsonl", rows))}
    _, plain = ensure(MIXED, pinned(source, mixture=MIXTURE))
    _, both = ensure(MIXED, pinned(source, mixture=MIXTURE | DEDUPLICATION | DECONTAMINATION))
    assert plain["ref"] != both["ref"] and {*both["inputs"]} > {*plain["inputs"]}
    assert plain["content"] == both["content"], "so that nothing after it is made again"
