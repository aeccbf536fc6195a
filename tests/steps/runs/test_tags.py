"""Tags of a run: what each recipe gives, within what Metaflow takes."""

from typing import Any

import pytest
from metaflow.tagging_util import MAX_TAG_SIZE, validate_tags

from sft_core.recipe.parse import override, parse_recipe
from sft_core.store.provenance import SourceCode
from steps.runs.recorded import Attempt
from steps.runs.tags import resumed_tags, tag_run, tags_of

COMMIT: SourceCode = {"version": "0.1.0", "commit": "0123456789abcdef", "dirty": False}
NOWHERE: SourceCode = {"version": "0.1.0", "commit": None, "dirty": None}


def tags(data: dict[str, Any], source: SourceCode, *overrides: str) -> list[str]:
    found = tags_of(parse_recipe(override(data, overrides)), source)
    validate_tags(found)
    return found


def test_tags_of_random_weights_and_a_commit(small_recipe):
    assert tags(small_recipe, COMMIT) == ["recipe:small", "model:random llama", "commit:0123456"]
    assert tags(small_recipe, {**COMMIT, "dirty": True})[-1] == "commit:0123456-dirty"


def test_tags_without_a_checkout_have_no_commit(small_recipe):
    assert tags(small_recipe, NOWHERE) == ["recipe:small", "model:random llama"]


@pytest.mark.parametrize(
    ("name", "expected"), [("org/model-7B", "org/model-7B"), ("{folder}/mine", "mine"), ("{folder}/mine/.", "mine")]
)
def test_tags_name_a_hub_id_whole_and_a_folder_without_its_place(small_recipe, tmp_path, name: str, expected: str):
    (tmp_path / "mine").mkdir()
    chosen = ("model.config=null", f"model.model_name_or_path={name.format(folder=tmp_path)}")
    assert tags(small_recipe, NOWHERE, *chosen)[1] == f"model:{expected}"


def test_tags_of_a_search_name_its_strategy(small_recipe):
    search = ("search={strategy: msft, preset: robust}", "training.lr_scheduler_type=constant")
    assert tags(small_recipe, NOWHERE, *search)[-1] == "strategy:msft"


def test_tags_are_cut_to_what_metaflow_takes(small_recipe):
    found = tags(small_recipe, NOWHERE, f"name={'a' * 600}")
    assert found[0].startswith("recipe:aaa") and len(found[0]) == MAX_TAG_SIZE


def test_tags_of_a_resumed_run_are_its_own_and_the_commit_that_goes_on():
    kept = ["mine", "model:org/m", "recipe:small"]
    run = Attempt("7", ["commit:7654321-dirty", *kept, "resumes:6"], [])
    assert resumed_tags(run, COMMIT) == [*kept, "commit:0123456", "resumes:7"]
    assert resumed_tags(run, NOWHERE) == [*kept, "resumes:7"]


def test_run_that_the_metadata_here_does_not_know_is_left_untagged(small_recipe, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    tag_run("SFTFlow/12", parse_recipe(small_recipe))
    assert "run=SFTFlow/12 status=untagged" in caplog.text and "recipe:small" in caplog.text
