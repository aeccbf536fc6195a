"""What a run will do: which change rebuilds what, and what is refused before anything is built."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import PinnedRecipe, pin, template_path
from sft_core.recipe.parse import load_recipe, override, parse_recipe
from sft_core.store.store import Store
from steps.mix import MIXTURE, SHARES_HEADER
from steps.plan import ORDER, differences, plan
from steps.report_prompts import count_report_prompts
from steps.start import prepare
from steps.toy import rendering_warnings

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("copy_no_think", "checksum_think")
MODELS = ("base", "tuned")
DATA = ("conversations", "rendered", "tokens")
DEPEND_ON_SPLITS = ("duplicates", "report_prompts", "contamination")


@pytest.fixture
def planned(sft, save_recipe):
    """`sft plan --json` as {(stage, name): (key, status)}."""

    def run(data: dict[str, Any], *overrides: str) -> dict[tuple[str, str], tuple[str | None, str]]:
        sets = [argument for text in overrides for argument in ("--set", text)]
        rows = json.loads(sft("plan", save_recipe(data), *sets, "--json").stdout)
        assert all(list(row) == ["stage", "name", "key", "status"] for row in rows)
        found = {(row["stage"], row["name"]): (row["key"], row["status"]) for row in rows}
        assert len(found) == len(rows)
        return found

    return run


def test_plan_nothing_built_builds_the_sources_and_the_rest_depends(small_recipe, planned):
    found = planned(small_recipe)
    evaluated = {("evaluated", f"{model},{task}") for model in MODELS for task in SOURCES}
    single = {("mixture", "-"), ("packed", "-"), ("trained", "0"), ("report", "-"), ("release", "-")}
    assert set(found) == {(stage, source) for stage in DATA for source in SOURCES} | evaluated | single
    assert [stage for stage, _ in found] == sorted((stage for stage, _ in found), key=ORDER.index)
    for (stage, _), (key, status) in found.items():
        assert status == ("build" if stage == "conversations" else "depends")
        assert (key is None) == (status == "depends")
    assert not Path(small_recipe["runtime"]["store"]).exists()


def test_plan_locates_an_output_once_for_each_reader(monkeypatch: pytest.MonkeyPatch):
    """Not once for each path: configs/smollm3.yaml has hundreds of outputs and a hundred thousand paths."""
    recipe = load_recipe(str(ROOT / "configs" / "smollm3.yaml"))
    sources = dict.fromkeys(recipe.sources, "a" * 40)
    pinned = PinnedRecipe(recipe, {"sources": sources, "tokenizer": "b" * 40, "model": "e" * 40, "template": "c" * 64})
    located, locate = [], Store.locate
    monkeypatch.setattr(Store, "locate", lambda self, *arguments: (located.append(1), locate(self, *arguments))[1])
    outputs = plan(Store("no-such-store"), pinned)
    inputs = [needed for one in outputs for needed in one.stage.inputs(pinned, one.part)]
    assert len(outputs) > 200 and len(located) <= len(outputs) + len(inputs) + 2  # 2: in `progress`


def test_plan_data_built_is_hit_and_training_is_next(built_recipe, planned):
    found = planned(built_recipe)
    statuses = {stage: {status for (s, _), (_, status) in found.items() if s == stage} for stage in ORDER}
    assert {s for s, status in statuses.items() if status == {"hit"}} == {*DATA, "mixture", "packed"}
    assert statuses["trained"] == {"build"} and statuses["report"] == statuses["release"] == {"depends"}
    assert statuses["pushed"] == set(), "nothing is pushed unless the recipe says where to"
    assert {found["evaluated", f"base,{task}"][1] for task in SOURCES} == {"build"}
    assert {found["evaluated", f"tuned,{task}"][1] for task in SOURCES} == {"depends"}


def test_plan_text_counts_what_is_there(built_recipe, sft, save_recipe):
    lines = sft("plan", save_recipe(built_recipe)).stdout.splitlines()
    assert lines[0].split() == ["stage", "name", "key", "status"]
    assert "8 are there, 3 to build, 4 depend on one to build" in lines
    assert any(line.startswith("unique report prompts a task: ") for line in lines)


def test_plan_lists_the_push_where_the_recipe_says_where_to(built_recipe, planned):
    without, found = planned(built_recipe), planned(built_recipe, "hub.model_id=me/tiny")
    assert found == {**without, ("pushed", "-"): (None, "depends")} and list(found)[-1] == ("pushed", "-")


def test_plan_other_weight_keeps_every_source(built_recipe, planned):
    before = planned(built_recipe)
    after = planned(built_recipe, "dataset_mixture.datasets.0.weight=0.5")
    moved = {place for place in before if before[place] != after[place]}
    assert moved == {("mixture", "-"), ("packed", "-"), ("trained", "0")}
    assert after["mixture", "-"][1] == "build" and after["packed", "-"] == (None, "depends")


def test_plan_other_learning_rate_keeps_all_data(built_recipe, planned):
    before, after = planned(built_recipe), planned(built_recipe, "training.learning_rate=1e-3")
    assert {place for place in before if before[place] != after[place]} == {("trained", "0")}
    assert after["trained", "0"][1] == "build"


def test_plan_one_more_source_adds_only_its_branch(built_recipe, planned):
    before = planned(built_recipe)
    path = str(ROOT / "configs" / "quickstart" / "sort_no_think.jsonl")
    built_recipe["dataset_mixture"]["datasets"].append({"path": path})
    after = planned(built_recipe)
    added = {place for place in after if place not in before}
    branch = {(stage, "sort_no_think") for stage in DATA}
    assert added == branch | {("evaluated", f"{model},sort_no_think") for model in MODELS}
    moved = {place for place in before if before[place] != after[place]}
    assert moved == {("mixture", "-"), ("packed", "-"), ("trained", "0")}
    assert after["conversations", "sort_no_think"][1] == "build"


RUNTIME = (
    "num_processes=2",
    "distributed=zero3",
    "keep_checkpoints=3",
    "num_threads=3",
    "num_workers=1",
    "eval_batch_size=5",
    "tokens_per_forward=4096",
    "save_steps=7",
    "logging_steps=9",
)


def test_plan_runtime_changes_nothing(built_recipe, planned):
    changes = [f"runtime.{text}" for text in (*RUNTIME, "report_to=[wandb]", "resources={train: {gpu: 8}}")]
    changes.append("runtime.vllm={python: x}")
    nodes = ["runtime.num_nodes=2"]  # by itself: the batch is no multiple of both
    keys = {text.split("=")[0] for text in [*changes, *nodes]} | {"runtime.store"}
    known = parse_recipe(built_recipe).runtime.__class__.model_fields
    assert keys == {f"runtime.{name}" for name in known}, "a new key of runtime: add it here"
    assert planned(built_recipe, *changes) == planned(built_recipe, *nodes) == planned(built_recipe)


def own_identities(data: dict[str, Any], *overrides: str) -> dict[str, list[Any]]:
    """By stage, what its outputs' identities hold besides the contents of their inputs."""
    recipe = parse_recipe(override(data, overrides))
    found: dict[str, list[Any]] = {}
    for located in plan(Store("nowhere"), pin(recipe)):
        found.setdefault(located.stage.name, []).append(
            {**located.identity, "inputs": sorted(located.identity["inputs"])}
        )
    return found


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("training.learning_rate=1e-3", {"trained"}),
        ("training.num_train_epochs=2", {"trained"}),
        ("training.seed=1", {"trained", "evaluated"}),
        ("training.bf16=true", {"trained", "evaluated"}),
        ("training.global_batch_size=4", {"trained"}),
        ("training.lora={r: 4}", {"trained"}),
        ("training.extra={adam_beta2: 0.9}", {"trained"}),
        ("training.loss_scope=all", {"rendered", "tokens", "packed"}),
        ("dataset_mixture.seed=1", {"mixture"}),
        ("dataset_mixture.datasets.0.num_rows=5", {"mixture"}),
        ("dataset_mixture.report_share=0.3", {"mixture", "evaluated"}),
        ("dataset_mixture.selection_share=0.3", {"mixture", "evaluated"}),
        ("dataset_mixture.max_rejected_share=0.3", {"conversations", "rendered"}),
        ("dataset_mixture.deduplication={}", {"mixture"}),
        ("dataset_mixture.decontamination={}", {"mixture"}),
        ("dataset_mixture.max_repeats=2", set()),
        ("dataset_mixture.datasets.0.format=messages", {"conversations"}),
        ("dataset_mixture.datasets.0.columns=[messages]", {"conversations"}),
        ("limit=50", {"conversations"}),
        ("packing.max_length=384", {"packed", "evaluated"}),
        ("packing.over_long=truncate", {"packed"}),
        ("packing.packing_strategy=none", {"packed"}),
        ("chat_template.date=2024-01-01", {"rendered", "tokens"}),
        ("chat_template.kwargs={header: false}", {"rendered", "tokens"}),
        ("chat_template.thinking=only_last", {"rendered", "tokens"}),
        ("chat_template.empty_thinking=masked", {"rendered", "tokens"}),
        ("chat_template.served_prefix=text", {"rendered", "tokens"}),
        ("chat_template.template=null", {"rendered", "tokens", "trained"}),
        ("model.add_special_tokens=[<x>]", {"rendered", "tokens", "trained", "evaluated"}),
        ("model.stop_tokens=[<|endoftext|>]", {"rendered", "tokens", "trained", "evaluated"}),
        ("model.dtype=bfloat16", {"trained", "evaluated"}),
        ("model.config.hidden_size=16", {"trained", "evaluated"}),
        ("evaluation.max_rows=9", {"evaluated"}),
        ("evaluation.max_new_tokens=9", {"evaluated"}),
        ("evaluation.max_new_tokens_by_task={copy_no_think: 9}", {"evaluated"}),
        ("evaluation.metric_by_task={copy_no_think: choice}", {"evaluated"}),
        ("evaluation.sampling={temperature: 0.7}", {"evaluated"}),
        ("evaluation.tasks=[copy_no_think]", {"evaluated", "report"}),
        ("evaluation.min_report_rows=1", set()),
        ("model.trust_remote_code=true", set()),
        ("name=other", {"report"}),
    ],
)
def test_identity_a_changed_key_is_in_the_stages_that_read_it(small_recipe, change: str, stages: set[str]):
    before, after = own_identities(small_recipe), own_identities(small_recipe, change)
    assert {stage for stage in before if before[stage] != after[stage]} == {*stages, "release"}, "its card shows it all"


def test_identity_the_hub_is_in_the_push_alone(small_recipe):
    without, pushed = own_identities(small_recipe), own_identities(small_recipe, "hub.model_id=me/tiny")
    assert pushed.keys() - without.keys() == {"pushed"}
    assert {stage for stage in without if without[stage] != pushed[stage]} == set()
    for change in ("hub.model_id=me/other", "hub.private=false", "hub.revision=v2"):
        after = own_identities(small_recipe, "hub.model_id=me/tiny", change)
        assert {stage for stage in pushed if pushed[stage] != after[stage]} == {"pushed"}


SHARED = tuple(f"dataset_mixture.datasets.{n}.trained_token_share=1" for n in (0, 1))
BOTH = ("dataset_mixture.deduplication={}", "dataset_mixture.decontamination={}")


@pytest.mark.parametrize(
    ("before", "change", "stages"),
    [
        (BOTH, "dataset_mixture.deduplication.threshold=0.5", {"duplicates"}),
        (BOTH, "dataset_mixture.deduplication.ngram=3", {"signatures", "duplicates"}),
        (BOTH, "dataset_mixture.deduplication.num_permutations=64", {"signatures"}),
        (BOTH, "dataset_mixture.deduplication.near=false", {"signatures", "duplicates"}),
        (BOTH, "dataset_mixture.decontamination.ngram=5", {"contamination"}),
        (BOTH, "dataset_mixture.decontamination.threshold=0.9", {"contamination"}),
        (BOTH, "dataset_mixture.decontamination.common_share=1", {"contamination"}),
        (BOTH, "evaluation.tasks=[copy_no_think]", {"report_prompts", "contamination", "evaluated", "report"}),
        (BOTH, "dataset_mixture.report_share=0.3", {*DEPEND_ON_SPLITS, "mixture", "evaluated"}),
        (BOTH, "dataset_mixture.datasets.0.weight=0.5", {"mixture"}),
        (BOTH, "dataset_mixture.seed=1", {"mixture"}),
        (SHARED, "dataset_mixture.datasets.0.trained_token_share=2", {"mixture"}),
        (SHARED, "dataset_mixture.num_trained_tokens=99", {"mixture"}),
        (SHARED, "dataset_mixture.max_repeats=2", {"mixture"}),
    ],
)
def test_identity_a_changed_key_of_the_mixture_is_in_the_stages_that_read_it(
    small_recipe, before: tuple[str, ...], change: str, stages: set[str]
):
    first, second = own_identities(small_recipe, *before), own_identities(small_recipe, *before, change)
    assert {stage for stage in first if first[stage] != second[stage]} == {*stages, "release"}


def test_plan_lists_the_stages_of_deduplication_and_decontamination_only_when_asked(built_recipe, planned):
    without = planned(built_recipe)
    found = planned(built_recipe, *BOTH, "evaluation.tasks=[copy_no_think]")
    added = {place for place in found if place not in without}
    assert added == {
        *{(stage, source) for stage in ("signatures", "contamination") for source in SOURCES},
        *{("duplicates", "-"), ("report_prompts", "copy_no_think")},
    }
    assert found["signatures", "copy_no_think"][1] == "build" and found["duplicates", "-"][1] == "depends"
    assert [stage for stage, _ in found] == sorted((stage for stage, _ in found), key=ORDER.index)


def test_plan_source_without_a_share_is_neither_signed_nor_searched(small_recipe, planned):
    found = planned(small_recipe, *BOTH, "dataset_mixture.datasets.0.weight=0")
    assert [name for stage, name in found if stage in ("signatures", "contamination")] == [SOURCES[1]] * 2


# Shares


@pytest.fixture
def shares(sft, save_recipe):
    """The second table of `sft plan`: its cells by source; and the output as a whole."""

    def run(data: dict[str, Any], *overrides: str) -> dict[str, list[str]]:
        sets = [argument for text in overrides for argument in ("--set", text)]
        run.output = sft("plan", save_recipe(data), *sets).output
        header, _, *rows = run.output.split("\n\n")[-1].strip().splitlines()[: 2 + len(SOURCES)]
        assert re.split("  +", header) == list(SHARES_HEADER)
        cells = [re.split("  +", row.strip()) for row in rows]
        return {name: found for name, *found in cells}

    return run


def mixed(data: dict[str, Any], *overrides: str) -> dict[str, Any]:
    pinned = pin(parse_recipe(override(data, overrides)))
    store = Store(pinned.recipe.runtime.store)
    return store.manifest(store.ensure(MIXTURE, pinned))["counts"]["sources"]


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ((), ["all rows", "all rows"]),
        (
            ("dataset_mixture.datasets.0.weight=0.5", "dataset_mixture.datasets.1.num_rows=12"),
            ["weight 0.5", "12 rows"],
        ),
        (
            (*SHARED, "dataset_mixture.datasets.0.trained_token_share=3"),
            [f"{n}.0% of trained tokens" for n in (75, 25)],
        ),
    ],
)
def test_plan_shares_before_the_mixture_are_those_that_it_will_have(built_recipe, shares, changes, asked):
    store = Path(built_recipe["runtime"]["store"])
    before = (store / "builds.jsonl").read_text()
    foreseen = shares(built_recipe, *changes)
    assert (store / "builds.jsonl").read_text() == before, "a plan builds nothing"
    built = mixed(built_recipe, *changes)
    assert [row[0] for row in foreseen.values()] == asked
    for name, (_, available, kept, change) in foreseen.items():
        one = built[name]
        assert (int(available), int(kept)) == (one["available"], one["kept"])
        assert change == " → ".join(f"{one[kind]['trained_tokens']:.1%}" for kind in ("requested", "achieved"))
    assert shares(built_recipe, *changes) == foreseen, "read from the manifest they are the same"


@pytest.mark.slow
def test_plan_shares_not_known_yet_are_dashes(small_recipe, shares):
    found = shares(small_recipe, "dataset_mixture.datasets.0.weight=0.5")
    assert found == {SOURCES[0]: ["weight 0.5", "-", "-", "-"], SOURCES[1]: ["all rows", "-", "-", "-"]}


@pytest.mark.slow
def test_plan_shares_of_a_source_that_is_there_say_what_is_available(built_recipe, shares):
    built_recipe["dataset_mixture"]["datasets"][1] = {"path": str(ROOT / "configs/quickstart/sort_no_think.jsonl")}
    found = shares(built_recipe)
    assert int(found[SOURCES[0]][1]) > 30 and found[SOURCES[0]][2:] == ["-", "-"]
    assert found["sort_no_think"][1:] == ["-", "-", "-"]


def test_plan_shares_wait_for_what_leaves_rows_out(built_recipe, shares):
    assert {tuple(row[1:]) for row in shares(built_recipe, *BOTH).values()} == {("-", "-", "-")}
    mixed(built_recipe, *BOTH)
    again = shares(built_recipe, *BOTH, "dataset_mixture.seed=5")
    assert all(int(row[1]) > 30 for row in again.values()), "duplicates are there, the mixture is not"


def test_plan_tells_of_a_source_that_is_held_at_its_cap(built_recipe, shares):
    changes = (*SHARED, "dataset_mixture.datasets.0.trained_token_share=20")
    shares(built_recipe, *changes)
    assert "source=copy_no_think is held at max_repeats 4: " in shares.output
    assert "num_trained_tokens" not in shares.output
    shares(built_recipe, *changes, "dataset_mixture.num_trained_tokens=10000000")
    assert "dataset_mixture.num_trained_tokens: found 10000000; at max_repeats 4 the sources give" in shares.output


def test_plan_source_moved_elsewhere_keeps_every_key(built_recipe, planned, tmp_path: Path):
    before = planned(built_recipe)
    for dataset in built_recipe["dataset_mixture"]["datasets"]:
        copy = tmp_path / Path(dataset["path"]).name
        copy.write_bytes(Path(dataset["path"]).read_bytes())
        dataset["path"] = str(copy)
    assert planned(built_recipe) == before


def test_differences_are_told_by_dotted_keys():
    before = {"a": {"b": 1, "c": [1], "same": 0}, "gone": 1}
    after = {"a": {"b": 2, "c": [2], "same": 0}, "new": {"x": 1}}
    expected = [("a.b", 1, 2), ("a.c", [1], [2]), ("gone", 1, None), ("new", None, {"x": 1})]
    assert list(differences(before, after)) == expected
    assert list(differences(before, before)) == []


# Report prompts


def test_count_report_prompts_is_the_same_before_and_after_the_download(built_recipe, tmp_path: Path):
    pinned = pin(parse_recipe(built_recipe))
    scanned, read = (count_report_prompts(Store(root), pinned) for root in (tmp_path, built_recipe["runtime"]["store"]))
    assert scanned == read
    assert set(scanned) == set(SOURCES) and min(scanned.values()) > 0


def test_count_report_prompts_a_row_that_is_no_unicode_is_left_to_the_download(small_recipe, tmp_path: Path):
    good = (ROOT / "configs" / "quickstart" / "copy_no_think.jsonl").read_text().splitlines()[:60]
    bad = '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}'
    assert "\ud800" in json.loads(bad)["messages"][0]["content"]
    counts = []
    for lines in (good, [bad, *good]):
        (tmp_path / "copy_no_think.jsonl").write_text("\n".join(lines))
        small_recipe["dataset_mixture"]["datasets"] = [{"path": str(tmp_path / "copy_no_think.jsonl")}]
        pinned = pin(parse_recipe(override(small_recipe, ("limit=61",))))
        counts.append(count_report_prompts(Store(tmp_path / "s"), pinned)["copy_no_think"])
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("source", ["small_recipe", "built_recipe"])
def test_plan_too_few_report_prompts_is_refused(source: str, request, sft, save_recipe):
    data = request.getfixturevalue(source)
    data["dataset_mixture"]["report_share"] = 0.0
    message = sft("plan", save_recipe(data), "--set", "limit=null", code=1).output
    assert "evaluation.min_report_rows: found too few unique report prompts (copy_no_think has 0" in message
    data["dataset_mixture"]["report_share"] = 0.15
    path = save_recipe(data)
    sft("plan", path)  # a smoke run scores what it has
    message = sft("plan", path, "--set", "limit=null", "--set", "evaluation.min_report_rows=1000", code=1).output
    assert "at least 1000 are needed" in message


@pytest.mark.slow
def test_prepare_refuses_what_would_fail_later(small_recipe, tmp_path: Path):
    assert prepare(parse_recipe(small_recipe)).pins["sources"]
    with pytest.raises(ValueError, match=r"metric_by_task\.copy_no_think: .*found nothing as 'loadd' in json"):
        prepare(parse_recipe(override(small_recipe, ("evaluation.metric_by_task={copy_no_think: 'json:loadd'}",))))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        prepare(parse_recipe(override(small_recipe, (f"runtime.store={tmp_path}/file/store",))))
    with pytest.raises(ValueError, match="too few unique report prompts"):
        prepare(parse_recipe(override(small_recipe, ("dataset_mixture.report_share=0", "limit=null"))))


# training.extra


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("adam_beta_2=0.9", "training.extra.adam_beta_2: no field of trl.SFTConfig; did you mean 'adam_beta2'?"),
        (
            "learning_rate=0.1",
            "training.extra.learning_rate: set by the recipe's own keys or by the pipeline; remove it",
        ),
        ("output_dir=x", "training.extra.output_dir: set by the recipe's own keys or by the pipeline; remove it"),
        ("adam_beta2=high", "training.extra.adam_beta2: found 'high'; input should be a valid number"),
        ("adam_beta2=[1]", "training.extra.adam_beta2: found [1]; "),
    ],
)
def test_plan_wrong_extra_is_refused(small_recipe, sft, save_recipe, extra: str, expected: str):
    assert expected in sft("plan", save_recipe(small_recipe), "--set", f"training.extra.{extra}", code=1).output


@pytest.mark.slow
def test_plan_right_extra_is_accepted(small_recipe, sft, save_recipe):
    fields = ("adam_beta2=0.98", "adam_beta1=1", "optim=adamw_torch", "neftune_noise_alpha=5.0")
    sft("plan", save_recipe(small_recipe), *(a for text in fields for a in ("--set", f"training.extra.{text}")))


def test_quickstart_extra_is_accepted():
    from sft_core.recipe.parse import load_recipe
    from sft_core.train.arguments import check_extra

    extra = load_recipe(ROOT / "configs" / "quickstart.yaml").last_phase.training.extra
    assert extra
    check_extra(extra)


def test_plan_of_an_unresolved_source_has_no_key_yet(small_recipe):
    pinned = pin(parse_recipe(small_recipe))
    sources = pinned.pins["sources"]
    unknown = PinnedRecipe(pinned.recipe, {**pinned.pins, "sources": {**sources, "copy_no_think": None}})
    found = {f"{one.stage.name} {one.name}": one for one in plan(Store("none"), unknown)}
    assert found["conversations copy_no_think"].status == "depends" and found["conversations copy_no_think"].ref is None
    assert found["conversations checksum_think"].status == "build"


def test_plan_memory_estimates_what_training_takes_until_it_is_there(sft, save_recipe, built_recipe):
    path = save_recipe(built_recipe)
    assert "parameters by ddp" not in sft("plan", path).stdout
    line = sft("plan", path, "--memory", "--set", "training.learning_rate=5e-4").stdout.splitlines()[-1]
    assert re.search(
        r"M parameters by ddp on 1 rank\(s\): about [\d.]+ [KM]iB on each, [\d.]+ [KM]iB for weights", line
    )


# The toy conversation


@pytest.mark.slow
def test_template_that_no_row_can_be_trained_with_is_refused_before_any_work(
    small_recipe, sft, save_recipe, tmp_path: Path
):
    (tmp_path / "silent.jinja").write_text(
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    )
    template = f"chat_template.template={tmp_path}/silent.jinja"
    expected = "chat_template: a toy conversation of a user and an assistant cannot be trained"
    with pytest.raises(ValueError, match=expected):
        prepare(parse_recipe(override(small_recipe, (template,))))
    path = save_recipe(small_recipe)
    sft("plan", path)
    result = sft("plan", path, "--set", template, code=1)
    assert expected in result.output and "conversations" in result.output, "after the table"
    assert not (Path(small_recipe["runtime"]["store"]) / "builds.jsonl").exists()


def test_plan_tries_no_tokenizer_that_is_not_on_this_machine():
    recipe = load_recipe(str(ROOT / "configs" / "smollm3.yaml"))
    sources, path = dict.fromkeys(recipe.sources, "a" * 40), template_path(recipe)
    assert path is not None
    template = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = PinnedRecipe(recipe, {"sources": sources, "tokenizer": "b" * 40, "model": "e" * 40, "template": template})
    (warning,) = rendering_warnings(plan(Store("no-such-store"), pinned), pinned, fetches=False)
    assert "not tried, since the tokenizer is not on this machine yet" in warning


def test_toy_conversation_is_not_tried_where_every_row_is_tokenized(built_recipe, monkeypatch: pytest.MonkeyPatch):
    pinned = pin(parse_recipe(built_recipe))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", "no-such-python")
    assert rendering_warnings(plan(Store(built_recipe["runtime"]["store"]), pinned), pinned) == []
    with pytest.raises(FileNotFoundError, match="no-such-python"):
        rendering_warnings(plan(Store("none"), pinned), pinned)
