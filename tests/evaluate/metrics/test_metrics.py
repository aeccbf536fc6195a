"""Metrics read what they can of an output and refuse, before anything is generated, an answer that they cannot."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_core.evaluate.metrics.choice import choice_letter
from sft_core.evaluate.metrics.functions import Function
from sft_core.evaluate.metrics.json_answers import parse_json
from sft_core.evaluate.metrics.metric import Asked, Metric, Question
from sft_core.evaluate.metrics.registry import (
    check_metrics,
    check_names,
    load_metric,
    metric_classes,
    metric_identity,
)
from sft_core.recipe.evaluation import Evaluation
from sft_core.recipe.parse import parse_recipe
from steps.runs.recipes import read_recipe
from tests.train.tiny import tiny_recipe

SCHEMA = {
    "type": "object",
    "required": ["name", "at"],
    "properties": {"name": {"type": "string"}, "at": {"$ref": "#/$defs/place"}},
    "$defs": {"place": {"type": "integer"}},
}


def question(answer: str | None, target: str = "") -> Question:
    return Question("0123", answer, target)


def metric(name: str, **schema: Any) -> Metric:
    return load_metric({"name": name, **schema})


def wanted(of: Metric, answer: str) -> Any:
    asked = of.ask(question(answer))
    assert asked is not None
    return asked.wanted


def test_exact_match_is_the_whole_output_but_for_white_space() -> None:
    exact = metric("exact_match")
    assert exact.score("4 \n", wanted(exact, "\n4")) == 1
    assert exact.score("44", wanted(exact, "4")) == exact.score("", wanted(exact, "4")) == 0
    assert exact.ask(question(None)) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B.", "B"),
        ("B) Paris", "B"),
        ("B. Paris", "B"),
        ("(B) Paris", "B"),
        ("A: Paris", "A"),
        ("The answer is B.", "B"),
        ("The answer is B because A is too small", "B"),
        ("The answer is (C), not (A).", "C"),
        ("The answer to the question is C", "C"),
        ("The correct answer is option C.", "C"),
        ("**Answer:** D", "D"),
        ("answer: b", "B"),
        ("The final answer:\n\nB", "B"),
        ("So it is \\boxed{B}.", "B"),
        ("$\\boxed{\\text{A}}$", "A"),
        ("Option A is wrong. The answer is B", "B"),
        ("The answer is A. No, the answer is C.", "C"),
        ("It must be (B), as (B) says so", "B"),
        ("Maybe (A), maybe (B)", None),
        ("The answer is not B", None),
        ("The answer is a dog", None),
        ("The answer is Bob", None),
        ("A dog is an animal", None),
        ("Bob", None),
        ("Because", None),
        ("e.g. U.S.A", None),
        ("", None),
    ],
)
def test_choice_letter_is_the_one_that_the_text_decides_for(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


@given(st.sampled_from("ABCDEFGHIJ"), st.sampled_from(["{}", "({})", "The answer is {}.", "Answer: ({})", "{}. Yes"]))
def test_choice_letter_of_every_form_is_found(letter: str, form: str) -> None:
    assert choice_letter(form.format(letter)) == letter


@given(st.text("bcdefgh ABCDEFGH", min_size=2).filter(lambda text: all(len(word) > 1 for word in text.split())))
def test_choice_letter_inside_words_is_none(text: str) -> None:
    assert choice_letter(text) is None


def test_choice_answer_without_a_letter_is_refused() -> None:
    choice = metric("choice")
    assert choice.score("I think the answer is (b).", wanted(choice, "(B)")) == 1
    assert choice.score("C", wanted(choice, "B")) == 0
    with pytest.raises(ValueError, match=r"found 'Paris'; choice wants the letter"):
        choice.ask(question("Paris"))


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ('{"a": [1, null]}', 1),
        ('```json\n{"a": 1}\n```', 1),
        ("```\n[]\n```\n", 1),
        ("3", 1),
        ('Here it is: {"a": 1}', 0),
        ('{"a": 1', 0),
        ("{'a': 1}", 0),
        ('{"a": NaN}', 0),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_is_valid_json_with_or_without_a_fence(output: str, score: float) -> None:
    json_metric = metric("json")
    assert json_metric.ask(question(None)) == Asked(None, None), "no answer is needed"
    assert json_metric.score(output, None) == score


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values, st.booleans())
def test_json_any_value_is_read_back(value: Any, fenced: bool) -> None:
    text = json.dumps(value, indent=1)
    assert parse_json(f"```json\n{text}\n```" if fenced else text) == value


def test_json_schema_holds_the_value_against_the_schema() -> None:
    held = metric("json_schema", schema=SCHEMA)
    assert held.score('```json\n{"name": "x", "at": 3}\n```', None) == 1
    for wrong in ('{"name": "x", "at": "3"}', '{"name": "x"}', "[]", "x"):
        assert held.score(wrong, None) == 0


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objct"}, r"json_schema_by_task\.copy_no_think: is no JSON schema: \$\.type: 'objct' is not valid"),
        ({"$ref": "https://example.org/s.json"}, r"refers to 'https://example.org/s.json', which is not in it"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, r"refers to '#/\$defs/none', which is not in it"),
        ("nowhere.json", r"json_schema_by_task\.copy_no_think: found 'nowhere.json'; no such file"),
    ],
)
def test_json_schema_that_cannot_be_used_is_refused_before_work(schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_metrics(evaluation("json_schema", schema), ["copy_no_think"])


def evaluation(name: str, schema: Any = None) -> Evaluation:
    changes: dict[str, Any] = {"metric_by_task": {"copy_no_think": name}}
    if schema is not None:
        changes["json_schema_by_task"] = {"copy_no_think": schema}
    return parse_recipe(tiny_recipe(evaluation=changes)).evaluation


def test_json_schema_file_counts_by_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    of_file = metric_identity(evaluation("json_schema", str(path)), "copy_no_think")
    assert of_file == metric_identity(evaluation("json_schema", SCHEMA), "copy_no_think")
    path.write_text(json.dumps({**SCHEMA, "required": []}))
    assert metric_identity(evaluation("json_schema", str(path)), "copy_no_think") != of_file
    path.write_text("{")
    with pytest.raises(ValueError, match=r"json_schema_by_task\.copy_no_think: .*schema\.json is not JSON"):
        check_metrics(evaluation("json_schema", str(path)), ["copy_no_think"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_by_task": {"copy_no_think": "numric"}}, r"found 'numric'; it is no metric.*did you mean 'numeric'\?"),
        ({"metric_by_task": {"copy": "numeric"}}, r"evaluation\.metric_by_task: found 'copy'; it is no source"),
        ({"metric_by_task": {"copy_no_think": "json_schema"}}, r"give json_schema_by_task\.copy_no_think"),
        ({"json_schema_by_task": {"copy_no_think": {}}}, r"json_schema_by_task\.copy_no_think: no metric reads it"),
        ({"sampling": {"temperature": 0}}, r"evaluation\.sampling\.temperature: found 0"),
        ({"sampling": {"top_p": 1.5}}, r"evaluation\.sampling\.top_p: found 1\.5"),
        ({"sampling": {"tempersture": 1}}, r"unknown key; did you mean 'temperature'\?"),
    ],
)
def test_recipe_with_a_wrong_metric_or_sampling_names_the_key(
    changes: dict[str, Any], message: str, save_recipe: Callable[..., str]
) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(save_recipe(tiny_recipe(evaluation=changes)))


def test_every_metric_loads_by_its_identity() -> None:
    classes = {name: kind for name, kind in metric_classes().items() if kind is not Function}
    assert len(classes) > 5
    for name, kind in classes.items():
        task_evaluation = evaluation(name, SCHEMA if "schema" in kind.asks_for else None)
        check_metrics(task_evaluation, ["copy_no_think", "checksum_think"])
        metric = load_metric(metric_identity(task_evaluation, "copy_no_think"))
        assert type(metric) is kind and metric.name == name
        assert load_metric(metric_identity(task_evaluation, "checksum_think")).name == "exact_match"


def test_metric_identities_are_those_of_stored_scores() -> None:
    """A change here would score again everything that is in a store."""
    versions = {name: importlib.metadata.version(name) for name in ("math-verify", "jsonschema", "reasoning-gym")}
    assert metric_identity(evaluation("exact_match"), "copy_no_think") == {"name": "exact_match"}
    assert metric_identity(evaluation("exact_match"), "checksum_think") == {"name": "exact_match"}
    for name in ("choice", "json", "tool_call"):
        assert metric_identity(evaluation(name), "copy_no_think") == {"name": name}
    for name, library in (("numeric", "math-verify"), ("reasoning_gym", "reasoning-gym")):
        assert metric_identity(evaluation(name), "copy_no_think") == {"name": name, "library": versions[library]}
    expected = {"name": "json_schema", "schema": SCHEMA, "library": versions["jsonschema"]}
    assert metric_identity(evaluation("json_schema", SCHEMA), "copy_no_think") == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric_by_task": {"copy_no_think": "my_metrics.score"}},
            r"evaluation\.metric_by_task\.copy_no_think: found 'my_metrics\.score'; it is no metric, and no function "
            r"as package\.module:function",
        ),
        ({"metric_by_task": {"copy_no_think": "xyz"}}, r"known: choice, exact_match, json, json_schema, numeric, "),
        (
            {"json_schema_by_task": {"copy_no_think": {}}, "metric_by_task": {"copy_no_think": "json"}},
            r"json_schema_by_task\.copy_no_think: no metric reads it; set metric_by_task\.copy_no_think to "
            r"json_schema, or remove it",
        ),
    ],
)
def test_wrong_metric_is_refused_of_a_recipe_that_nobody_read_from_a_file(
    changes: dict[str, Any], message: str
) -> None:
    recipe = parse_recipe(tiny_recipe(evaluation=changes))
    with pytest.raises(ValueError, match=message):
        check_names(recipe.evaluation)
    with pytest.raises(ValueError, match=message):
        check_metrics(recipe.evaluation, [])


def test_metric_of_a_stage_is_refused_with_the_key_and_the_nearest_name() -> None:
    recipe = parse_recipe(tiny_recipe(evaluation={"metric_by_task": {"copy_no_think": "numric"}}))
    with pytest.raises(ValueError, match=r"evaluation\.metric_by_task\.copy_no_think: found 'numric'.*'numeric'\?"):
        metric_identity(recipe.evaluation, "copy_no_think")


@pytest.mark.slow
def test_reasoning_gym_items_are_scored_by_their_own_task_after_json() -> None:
    import reasoning_gym

    gym = metric("reasoning_gym")
    names = ["chain_sum", "countdown", "letter_counting", "maze", "word_ladder", "game_of_life", "sudoku"]
    for name in names:
        for item in reasoning_gym.create_dataset(name, size=3, seed=7):
            item_wanted = wanted(gym, json.dumps(item))
            assert gym.score(item["answer"], item_wanted) == 1, name
            assert gym.score("", item_wanted) < 1, name


def test_reasoning_gym_accepts_another_right_answer_where_exact_match_would_not() -> None:
    import reasoning_gym

    gym, (item,) = metric("reasoning_gym"), list(reasoning_gym.create_dataset("countdown", size=1, seed=3))
    other = f"({item['answer']})"
    assert gym.score(other, wanted(gym, json.dumps(item))) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("5", r"found '5'; reasoning_gym wants the whole item"),
        ('{"answer": "5"}', r"reasoning_gym wants the whole item"),
        ('{"answer": "5", "metadata": {"source_dataset": "chain_summ"}}', r"found 'chain_summ'; reasoning-gym has no"),
        ('{"answer": "5", "metadata": {"source_dataset": "rearc"}}', r"found 'rearc'; its items do not survive JSON"),
    ],
)
def test_reasoning_gym_answer_that_is_no_item_is_refused(answer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric("reasoning_gym").ask(question(answer))
