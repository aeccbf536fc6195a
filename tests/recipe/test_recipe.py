"""The recipe: what it accepts, and that every mistake is a ValueError in the user's words."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_core.recipe.datasets.dataset import Dataset
from sft_core.recipe.datasets.kinds.files import FileDataset
from sft_core.recipe.datasets.kinds.hub import HubDataset
from sft_core.recipe.parse import load_recipe, override, parse_recipe, read_yaml
from sft_core.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICKSTART = (ROOT / "configs" / "quickstart.yaml").read_text()


def error_of(data: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        parse_recipe(data)
    return str(caught.value)


def changed(data: dict[str, Any], *overrides: str) -> dict[str, Any]:
    return override(data, overrides)


def test_configs_all_are_found():
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_load_recipe_every_config_loads(path: Path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert len(recipe.tasks) > 0


def test_load_recipe_missing_file_says_where_it_looked():
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such recipe \(looked in /"):
        load_recipe("none.yaml")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainng", "training"),
        ("training.learning_rat", "learning_rate"),
        ("packing.max_len", "max_length"),
        ("dataset_mixture.datasets.0.wieght", "weight"),
        ("training.lora.alpha", "lora_alpha"),
    ],
)
def test_parse_unknown_key_names_the_nearest(small_recipe, key: str, nearest: str):
    message = error_of(changed(small_recipe, f"{key}=1"))
    assert message == f"{key.replace('.0', '[0]')}: unknown key; did you mean {nearest!r}?"


@pytest.mark.parametrize("model_id", ["me/tiny", "my-org/a.b_c-1", "M/0"])
def test_hub_model_id_owner_and_name_is_taken(small_recipe, model_id: str):
    hub = parse_recipe(changed(small_recipe, f"hub.model_id={model_id}")).hub
    assert hub is not None and (hub.model_id, hub.private, hub.revision) == (model_id, True, "main")
    assert parse_recipe(small_recipe).hub is None


@pytest.mark.parametrize(
    "model_id",
    ["tiny", "me/", "/tiny", "a/b/c", "me/ti ny", "me/a--b", "me/a..b", "me/x.git", "me/é", f"me/{'x' * 94}"],
)
def test_hub_model_id_of_another_form_is_refused(small_recipe, model_id: str):
    data = {**small_recipe, "hub": {"model_id": model_id}}
    assert error_of(data).startswith(f"hub.model_id: found {model_id!r}; it is owner/name, each of letters, digits")


@pytest.mark.parametrize("revision", ["", "a b", "-x", "a..b", "x/", "0" * 40])
def test_hub_revision_that_is_no_branch_is_refused(small_recipe, revision: str):
    data = {**small_recipe, "hub": {"model_id": "me/tiny", "revision": revision}}
    assert error_of(data) == f"hub.revision: found {revision!r}; it is the name of a branch, as main"


def test_hub_token_in_the_recipe_is_an_unknown_key(small_recipe):
    data = {**small_recipe, "hub": {"model_id": "me/tiny", "token": "hf_secret"}}
    assert error_of(data) == "hub.token: unknown key; known: model_id, private, revision"


def test_parse_unknown_key_like_no_other_lists_the_known(small_recipe):
    message = error_of(changed(small_recipe, "packing.zzz=1"))
    assert message == "packing.zzz: unknown key; known: max_length, over_long, packing_strategy"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("training.bf16=1", "training.bf16: found 1; input should be a valid boolean"),
        ("packing.max_length=1.5", "packing.max_length: found 1.5; input should be a valid integer"),
        ("training.learning_rate='1e-5'", "training.learning_rate: found '1e-5'; input should be a valid number"),
        ("training.learning_rate=.inf", "training.learning_rate: found inf; input should be a finite number"),
        ("training.learning_rate=0", "training.learning_rate: found 0; input should be greater than 0"),
        ("training=null", "training: found None; input should be an object"),
        ("name=3", "name: found 3; input should be a valid string"),
        ("dataset_mixture.datasets.0.path=5", "dataset_mixture.datasets[0].path: found 5; "),
        ("dataset_mixture.datasets.0.path=[]", "dataset_mixture.datasets[0].path: found []; "),
        ("packing.packing_strategy=bfd", "packing.packing_strategy: found 'bfd'; input should be 'ffd' or 'none'"),
        ("evaluation.max_new_tokens_by_task={copy_no_think: x}", "evaluation.max_new_tokens_by_task.copy_no_think: "),
        ("chat_template.date=today", "chat_template.date: found 'today'; input should be a valid date"),
        ("limit=0", "limit: found 0; input should be greater than 0"),
    ],
)
def test_parse_wrong_value_names_key_found_and_allowed(small_recipe, overrides: str, expected: str):
    assert expected in error_of(changed(small_recipe, overrides))


def test_parse_missing_key_is_named(small_recipe):
    del small_recipe["name"]
    assert error_of(small_recipe) == "name: missing; it has no default"


def test_parse_several_errors_are_told_at_once(small_recipe):
    message = error_of(changed(small_recipe, "nam=x", "training.seed=x", "dataset_mixture.datasets.1.weight=-1"))
    assert [line.split(":")[0] for line in message.splitlines()] == [
        "dataset_mixture.datasets[1].weight",
        "training.seed",
        "nam",
    ]


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "0.00001", "1.0e-5"])
def test_read_yaml_number_forms_are_numbers(text: str):
    assert read_yaml(f"learning_rate: {text}") == {"learning_rate": 1e-5}


def test_read_yaml_words_that_yaml_1_1_calls_booleans_are_words():
    assert read_yaml("a: yes\nb: off\nc: true") == {"a": "yes", "b": "off", "c": True}


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "a: [", "- a", "", "? [a, b]\n: c", "2020-01-01: c", "a: 2026-13-45", "a: &x [*x]"]
)
def test_read_yaml_faulty_text_is_a_value_error(text: str):
    with pytest.raises(ValueError, match=r"not valid YAML|is a mapping of sections"):
        read_yaml(text)


def test_read_yaml_a_key_that_stands_twice_is_named():
    twice = QUICKSTART.replace("  learning_rate: 8e-4", "  learning_rate: 8e-4\n  learning_rate: 1e-4")
    assert twice != QUICKSTART
    with pytest.raises(ValueError, match='duplicate key "learning_rate"'):
        read_yaml(twice)


@pytest.mark.parametrize(
    ("text", "where", "value"),
    [
        ("training.learning_rate=1e-5", lambda recipe: recipe.last_phase.training.learning_rate, 1e-5),
        ("training.lora.r=4", lambda recipe: recipe.last_phase.training.lora.r, 4),
        ("dataset_mixture.datasets.1.weight=0.5", lambda recipe: recipe.dataset("checksum_think").weight, 0.5),
        ("dataset_mixture.datasets.checksum_think.weight=2", lambda recipe: recipe.dataset("checksum_think").weight, 2),
        ("model.config.hidden_size=16", lambda recipe: recipe.model.config["hidden_size"], 16),
        ("evaluation.tasks=[copy_no_think]", lambda recipe: recipe.tasks, ["copy_no_think"]),
        ("limit=", lambda recipe: recipe.limit, None),
        ("chat_template.date=2024-02-03", lambda recipe: recipe.chat_template.date.isoformat(), "2024-02-03"),
    ],
)
def test_override_one_key_sets_it_and_nothing_else(small_recipe, text: str, where, value):
    before = copy.deepcopy(small_recipe)
    data = changed(small_recipe, text)
    assert small_recipe == before
    assert where(parse_recipe(data)) == value
    assert [key for key in data if data[key] != before.get(key)] == [text.split("=")[0].split(".")[0]]


def test_override_value_is_all_after_the_first_equals_sign(small_recipe):
    assert changed(small_recipe, "name=a=b")["name"] == "a=b"


def test_override_source_by_name_follows_a_given_name(small_recipe):
    small_recipe["dataset_mixture"]["datasets"][0]["name"] = "mine"
    data = changed(small_recipe, "dataset_mixture.datasets.mine.weight=0.5")
    assert parse_recipe(data).dataset("mine").weight == 0.5


def test_override_source_with_dots_in_its_name_is_found(small_recipe):
    small_recipe["dataset_mixture"]["datasets"][0]["name"] = "OpenThoughts3_1.2M_think"
    texts = ("dataset_mixture.datasets.{}.weight=0.5", "evaluation.max_new_tokens_by_task.{}=7")
    recipe = parse_recipe(changed(small_recipe, *(text.format("OpenThoughts3_1.2M_think") for text in texts)))
    assert recipe.dataset("OpenThoughts3_1.2M_think").weight == 0.5
    assert recipe.evaluation.max_new_tokens_by_task == {"OpenThoughts3_1.2M_think": 7}
    with pytest.raises(ValueError, match="no element 'OpenThoughts3_1'"):
        changed(small_recipe, "dataset_mixture.datasets.OpenThoughts3_1.2M.weight=0.5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.seed", "expected section.key=value"),
        ("=1", "expected section.key=value"),
        ("training.seed=[", "the value is not valid YAML"),
        ("name.x=1", "'x' is below a value that holds no keys"),
        ("name.x.y=1", "'x' is below a value that holds no keys"),
        ("dataset_mixture.datasets.0=1", "datasets is a list; name the element and its key"),
        ("dataset_mixture.datasets.none.weight=1", "no element 'none'; use a source's name or its index from 0"),
    ],
)
def test_override_bad_text_is_told(small_recipe, text: str, expected: str):
    with pytest.raises(ValueError) as caught:
        changed(small_recipe, text)
    assert str(caught.value).startswith(f"--set {text}: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("element", [{}, {"path": 5}, {"path": []}, [1], None, {"nmae": "x"}])
def test_override_beside_a_faulty_source_is_a_value_error(small_recipe, element: Any):
    small_recipe["dataset_mixture"]["datasets"][0] = element
    with pytest.raises(ValueError, match="no element 'none'"):
        changed(small_recipe, "dataset_mixture.datasets.none.weight=1")


def test_load_recipe_limit_and_overrides_are_applied(small_recipe, save_recipe):
    path = save_recipe(small_recipe)
    assert load_recipe(path).limit == 60
    assert load_recipe(path, limit=7).limit == 7
    recipe = load_recipe(path, overrides=("training.seed=1", "training.seed=2"), limit=7)
    assert (recipe.last_phase.training.seed, recipe.limit) == (2, 7)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("runtime.num_processes=4",), "training.global_batch_size: found 2; it is a multiple of"),
        (("evaluation.tasks=[copy_think]",), "evaluation.tasks: found 'copy_think'; it is no source; did you mean"),
        (("evaluation.tasks=[]",), "evaluation.tasks: found []"),
        (("evaluation.tasks=[copy_no_think, copy_no_think]",), "name each task once"),
        (("evaluation.max_new_tokens_by_task={cpy: 1}",), "evaluation.max_new_tokens_by_task: found 'cpy'; it is no"),
        (
            ("dataset_mixture.datasets.0.weight=1", "dataset_mixture.datasets.0.num_rows=1"),
            "dataset_mixture.datasets[0]: give either weight or num_rows",
        ),
        (
            ("dataset_mixture.datasets.0.weight=1", "dataset_mixture.datasets.0.trained_token_share=1"),
            "dataset_mixture.datasets[0]: give either weight or trained_token_share",
        ),
        (
            ("dataset_mixture.datasets.0.trained_token_share=1",),
            "dataset_mixture: trained_token_share is missing for checksum_think; give it to every dataset",
        ),
        (
            tuple(f"dataset_mixture.datasets.{n}.trained_token_share=0" for n in (0, 1)),
            "dataset_mixture: every trained_token_share is 0",
        ),
        (("dataset_mixture.num_trained_tokens=9",), "num_trained_tokens needs a trained_token_share for every dataset"),
        (("dataset_mixture.max_repeats=0",), "dataset_mixture.max_repeats: found 0; input should be greater than 0"),
        (
            ("dataset_mixture.deduplication.ngrams=4",),
            "dataset_mixture.deduplication.ngrams: unknown key; did you mean",
        ),
        (("dataset_mixture.deduplication={threshold: 1.5}",), "dataset_mixture.deduplication.threshold: found 1.5"),
        (("dataset_mixture.decontamination={ngram: 0}",), "dataset_mixture.decontamination.ngram: found 0"),
        (("dataset_mixture.datasets.0.id=a/b",), "dataset_mixture.datasets[0]: give either id"),
        (("dataset_mixture.datasets.0.path=null",), "dataset_mixture.datasets[0]: give either id"),
        (("dataset_mixture.datasets.0.name=checksum_think",), "two datasets are called 'checksum_think'"),
        (("dataset_mixture.datasets.0.name=packs",), "a dataset is called 'packs', as an output of the flow is"),
        (("dataset_mixture.datasets.0.path=a/mixture.jsonl",), "a dataset is called 'mixture'"),
        (("dataset_mixture.report_share=0.99",), "their sum must be under 1"),
        (("model.model_name_or_path=a/b",), "model: give either model_name_or_path or config"),
        (("model.tokenizer_name_or_path=null",), "model: a model from config needs tokenizer_name_or_path"),
        (("model.config={hidden_size: 8}",), "model: config.model_type is missing"),
        (
            ("evaluation.engine=vllm", "evaluation.sampling={temperature: 2.1}"),
            "evaluation: sampling.temperature: found 2.1; vllm draws at 2 and less",
        ),
        (("packing.max_length=1",), "packing.max_length: found 1; a pack holds at least 2 tokens"),
    ],
)
def test_parse_keys_that_contradict_are_told(small_recipe, overrides: tuple[str, ...], expected: str):
    assert parse_recipe(small_recipe)
    assert expected in error_of(changed(small_recipe, *overrides))


NO_KIND = "give either id (a hub dataset) or path (local files)"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({}, f": {NO_KIND}"),
        ({"path": None, "split": "x"}, f": {NO_KIND}"),
        ({"path": "a", "id": "b/c"}, f": {NO_KIND}"),
        ({"pth": "a"}, ".pth: unknown key; did you mean 'path'?"),
        ({"path": "a", "weigth": None}, ".weigth: unknown key; did you mean 'weight'?"),
        ({"path": "a", "split": "x"}, ".split: a dataset with path has no such key, only one with id has; remove it"),
        ({"path": "a", "id": 5}, f": {NO_KIND}"),
        ([1], ": found [1]; a dataset is a mapping with the key id (a hub dataset) or path (local files)"),
        (None, ": found None; a dataset is a mapping with the key id (a hub dataset) or path (local files)"),
    ],
)
def test_parse_dataset_of_no_kind_is_told(small_recipe, dataset: Any, message: str):
    small_recipe["dataset_mixture"]["datasets"] = [dataset]
    assert error_of(small_recipe) == f"dataset_mixture.datasets[0]{message}"


def test_parse_keys_of_another_kind_at_their_defaults_say_nothing(small_recipe):
    """As in recipes on model cards, which were written when every dataset had the keys of a hub dataset."""
    small_recipe["dataset_mixture"]["datasets"] = [
        {"id": None, "config": None, "split": "train", "revision": "main", "path": ["a.jsonl"], "columns": None},
        {"id": "org/chat", "config": None, "split": "test", "revision": "main", "path": None},
    ]
    files, hub = parse_recipe(small_recipe).datasets
    assert files.model_dump() == {**dict.fromkeys(Dataset.model_fields), "path": ("a.jsonl",), "format": "auto"}
    assert isinstance(hub, HubDataset) and (hub.id, hub.split) == ("org/chat", "test")


def test_override_turns_a_hub_dataset_into_local_files(small_recipe):
    small_recipe["dataset_mixture"]["datasets"] = [{"name": "chat", "id": "org/chat"}]
    data = changed(small_recipe, "dataset_mixture.datasets.chat.path=a.jsonl", "dataset_mixture.datasets.chat.id=")
    assert isinstance(parse_recipe(data).dataset("chat"), FileDataset)


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ({"path": "a/b c.jsonl.gz"}, "b_c"),
        ({"path": ["x/first.jsonl", "x/second.jsonl"]}, "first"),
        ({"path": "x/*.jsonl"}, "_"),
        ({"id": "org/chat"}, "chat"),
        ({"id": "org/chat", "split": "maths_no_think"}, "maths_no_think"),
        ({"id": "org/chat", "split": "maths", "name": "mine"}, "mine"),
    ],
)
def test_source_name_default_is_the_split_or_the_file(small_recipe, dataset: dict, name: str):
    small_recipe["dataset_mixture"]["datasets"] = [dataset]
    assert parse_recipe(small_recipe).sources == [name]


def test_input_names_of_stages_that_read_every_source_are_reserved(small_recipe):
    """A source that is called as another input of the stage would take its place."""
    from sft_core.pins.pinned import pin
    from steps.evaluate import EVALUATED
    from steps.mix import MIXTURE
    from steps.pack import PACKED
    from steps.train import TRAINED

    pinned = pin(parse_recipe(small_recipe))
    parts = {"trained": {"round": 0}, "evaluated": {"model": "tuned", "task": "copy_no_think"}}
    others = set()
    for stage in (MIXTURE, PACKED, TRAINED):
        others |= set(stage.needs(pinned, parts.get(stage.name, {}))) - set(pinned.recipe.sources)
    assert others == {"mixture", "packs"}
    assert set(EVALUATED.needs(pinned, parts["evaluated"])) == {"tokens", "trained"}


names = st.sampled_from([name for name in Recipe.model_fields] + ["learning_rate", "path", "datasets", "id", "x"])
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.dictionaries(names | st.text(max_size=5), plain, max_size=6))
def test_parse_random_plain_data_raises_nothing_but_value_error(data: dict[str, Any]):
    with pytest.raises(ValueError) as caught:
        parse_recipe(data)
    assert str(caught.value)


def places(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in below for found in ((*above, key), *places(value, (*above, key)))]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parse_one_random_value_in_a_good_recipe_raises_nothing_but_value_error(small_recipe, data):
    mutated = copy.deepcopy(small_recipe)
    *parents, last = data.draw(st.sampled_from(places(mutated)))
    node = mutated
    for parent in parents:
        node = node[parent]
    node[last] = data.draw(plain)
    try:
        recipe = parse_recipe(mutated)
    except ValueError as error:
        assert str(error)
    else:
        assert recipe.sources


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab:-?[]{},&*!|>'\"#\n %@`01.e", max_size=20))
def test_read_yaml_and_override_random_text_raise_nothing_but_value_error(text: str):
    for call in (lambda: read_yaml(text), lambda: override({"a": {"b": [{"name": "e"}]}}, (text,))):
        try:
            assert isinstance(call(), dict)
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("lm_eval", "message"),
    [
        ({"tasks": []}, "evaluation.lm_eval.tasks: found []"),
        ({"tasks": ["a", "a"]}, "evaluation.lm_eval: tasks: found a, a; name each task once"),
        ({"tasks": ["a"], "fewshot": 1}, "evaluation.lm_eval.fewshot: unknown key; did you mean 'num_fewshot'?"),
        (
            {"tasks": ["a"], "apply_chat_template": False, "chat_template_kwargs": {"enable_thinking": False}},
            "evaluation.lm_eval: chat_template_kwargs: apply_chat_template is false; remove one of the two",
        ),
    ],
)
def test_lm_eval_mistakes_are_told(small_recipe, lm_eval: dict[str, Any], message: str):
    assert error_of(small_recipe | {"evaluation": {"lm_eval": lm_eval}}).startswith(message)


def test_scored_tasks_of_the_harness_stand_behind_the_sources_with_a_prefix(small_recipe):
    recipe = parse_recipe(small_recipe | {"evaluation": {"tasks": ["copy_no_think"], "lm_eval": {"tasks": ["arc"]}}})
    assert recipe.scored == ["copy_no_think", "lm_eval:arc"] and recipe.tasks == ["copy_no_think"]
