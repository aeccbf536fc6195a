"""Counts of manifests: what an earlier version wrote is read, and written again as it was."""

import dataclasses
import json
from pathlib import Path

import pytest

from sft_core.counts import Counts
from sft_core.data.mixing.mixture_counts import MixtureCounts
from sft_core.data.packing.pack_counts import PackCounts
from sft_core.data.rendering.build import RenderedCounts
from sft_core.data.sources.conversation_counts import ConversationCounts
from sft_core.data.tokens.token_counts import TokenCounts
from sft_core.evaluate.counts import EvaluatedCounts, ReportCounts
from sft_core.train.counts import TrainedCounts

# Of a quickstart by commit b6aa091, before counts had types; of the mixture one source, of the report two rows.
RECORDED = json.loads(Path(__file__).with_name("recorded_counts.json").read_text())
CLASSES: dict[str, type[Counts]] = {
    "conversations": ConversationCounts,
    "rendered": RenderedCounts,
    "tokens": TokenCounts,
    "mixture": MixtureCounts,
    "packed": PackCounts,
    "trained": TrainedCounts,
    "evaluated": EvaluatedCounts,
    "report": ReportCounts,
}


@pytest.mark.parametrize("stage", CLASSES)
def test_recorded_counts_are_read_and_written_as_they_were(stage: str):
    counts = CLASSES[stage].from_json(RECORDED[stage])
    written = json.loads(json.dumps(counts.to_json()))
    assert written == RECORDED[stage] and list(written) == list(RECORDED[stage])


@pytest.mark.parametrize("stage", CLASSES)
def test_keys_of_later_versions_are_ignored_and_those_with_a_default_may_be_missing(stage: str):
    kind = CLASSES[stage]
    fields = dataclasses.fields(kind)
    needed = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    earlier = {name: value for name, value in RECORDED[stage].items() if name in needed}
    counts = kind.from_json({**earlier, "of a later version": 1})
    assert needed and all(hasattr(counts, field.name) for field in fields)


def test_key_that_only_some_manifests_have_is_written_by_them_alone():
    alone = EvaluatedCounts.from_json({**RECORDED["evaluated"], "documents": "alone"})
    assert alone.to_json()["documents"] == "alone"
    change = {"task": "a", "metric": "loss", "phase": "sft", "before": "mid", "value": 1.0, "low": None, "high": None}
    assert ReportCounts.from_json({**RECORDED["report"], "phases": [change]}).to_json()["phases"] == [change]
