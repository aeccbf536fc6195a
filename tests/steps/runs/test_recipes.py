"""Wherever a recipe is read, a metric that does not exist is refused, with the key and the nearest name."""

import json
from pathlib import Path

import pytest
from metaflow.exception import MetaflowException

from sft_core.recipe.parse import override
from steps.runs.recipes import effective, parse_config
from steps.start import prepare

WRONG = "evaluation.metric_by_task={copy_no_think: exact_mtch}"
REFUSED = (
    "evaluation.metric_by_task.copy_no_think: found 'exact_mtch'; it is no metric, and no function as "
    "package.module:function; did you mean 'exact_match'?"
)


@pytest.mark.parametrize("command", [("plan",), ("plan", "--json"), ("check",), ("show", "--source", "copy_no_think")])
def test_command_refuses_an_unknown_metric_before_anything_is_built(
    command: tuple[str, ...], small_recipe, sft, save_recipe, tmp_path: Path
):
    name, *options = command
    assert f"Error: {REFUSED}\n" in sft(name, save_recipe(small_recipe), *options, "--set", WRONG, code=1).output
    assert not (tmp_path / "store").exists()


def test_explain_refuses_an_unknown_metric(small_recipe, sft, save_recipe):
    wrong = save_recipe(override(small_recipe, (WRONG,)), "wrong.yaml")
    assert REFUSED in sft("explain", save_recipe(small_recipe), wrong, code=1).output


def test_config_of_the_flow_with_an_unknown_metric_is_refused(small_recipe):
    assert parse_config(json.dumps(small_recipe))["name"] == "small"
    with pytest.raises(MetaflowException, match="did you mean 'exact_match'"):
        parse_config(json.dumps(override(small_recipe, (WRONG,))))


@pytest.mark.parametrize("source", ["copy_no_think", "checksum_think"])
def test_start_of_the_flow_refuses_an_unknown_metric_of_an_override_even_where_its_task_is_not_scored(
    small_recipe, source: str
):
    wrong = (f"evaluation.metric_by_task.{source}=exact_mtch", "evaluation.tasks=[copy_no_think]")
    with pytest.raises(ValueError, match=rf"metric_by_task\.{source}: found 'exact_mtch'.*'exact_match'\?"):
        prepare(effective(small_recipe, wrong, None))
