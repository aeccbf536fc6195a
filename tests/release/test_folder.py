"""The release: the checkpoint as it was scored, and a card that says what the manifests say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from sft_core.evaluate.rows import of_samples, read_rows
from sft_core.links import link_files
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.datasets.dataset import Dataset
from sft_core.recipe.parse import override, parse_recipe, read_yaml
from sft_core.store.manifest import file_digest
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.release import RELEASED
from tests.report.test_model_card import rows
from tests.train.tiny import ROOT, SOURCES

pytestmark = pytest.mark.slow


@pytest.fixture
def pinned(recipe: dict[str, Any]) -> PinnedRecipe:
    return pin(parse_recipe(recipe))


@pytest.fixture
def store(recipe: dict[str, Any]) -> Store:
    return Store(recipe["runtime"]["store"])


@pytest.fixture
def released(store: Store, pinned: PinnedRecipe) -> Ref:
    located = store.locate(RELEASED, pinned, {})
    assert located.status == "hit" and located.ref is not None
    return located.ref


@pytest.fixture
def manifests(store: Store, released: Ref) -> dict[str, dict[str, Any]]:
    """Of all that the release is made from, by the names that its stage has for them."""
    return {name: store.manifest(Ref(*ref)) for name, ref in store.manifest(released)["inputs"].items()}


@pytest.fixture
def readme(store: Store, released: Ref) -> str:
    return (store.path(released) / "model" / "README.md").read_text()


def test_card_numbers_are_those_of_the_manifests(readme: str, manifests: dict[str, dict[str, Any]], store: Store):
    wanted = [
        (task, score["metric"], round(score["value"], 6), score["n"])
        for task in SOURCES
        for score in manifests[f"tuned.{task}"]["counts"]["scores"]
    ]
    results = ModelCard(readme).data.eval_results
    assert [(r.dataset_name, r.metric_type, r.metric_value, r.metric_args["n"]) for r in results] == wanted
    assert len(wanted) == 8
    for (task, metric, value, n), cells in zip(wanted, rows(readme, "task | metric"), strict=True):
        base = {score["metric"]: score for score in manifests[f"base.{task}"]["counts"]["scores"]}[metric]["value"]
        assert cells[:3] == [task, metric.replace("_", " "), str(n)]
        assert cells[3].startswith(f"{base:.4f} (") and cells[4].startswith(f"{value:.4f} (")
    mixed, trained = manifests["mixture"]["counts"], manifests["trained"]["counts"]
    for source, cells in zip(SOURCES, rows(readme, "source | from"), strict=True):
        one = mixed["sources"][source]
        conversations = manifests[f"conversations:{source}"]["counts"]["conversations"]
        assert cells[0] == source and cells[1] == f"{source}.jsonl" and cells[3] == "unknown"
        assert cells[4:8] == [str(n) for n in (conversations, one["kept"], one["tokens"], one["trained_tokens"])]
        assert cells[8] == f"{one['trained_tokens'] / mixed['trained_tokens']:.1%}"
    assert f"- optimizer steps: {trained['steps']} of 4 packs" in readme
    assert f"- loss: {trained['first_loss']:.4f} first, {trained['last_loss']:.4f} last" in readme
    assert f"- packs: {manifests['packs']['counts']['packs']} of at most 384 tokens" in readme


def test_card_interval_of_a_share_is_wilsons_and_of_a_loss_the_normal_one(readme: str):
    results = {(r.dataset_name, r.metric_type): r for r in ModelCard(readme).data.eval_results}
    for task in SOURCES:
        share, loss = results[task, "exact_match"], results[task, "loss"]
        n = share.metric_args["n"]
        assert (share.metric_value, share.metric_args["low_95"]) == (0.0, 0.0), "it has learnt nothing in two steps"
        assert share.metric_args["high_95"] == pytest.approx(1.959964**2 / (n + 1.959964**2), abs=1e-6)
        middle = (loss.metric_args["low_95"] + loss.metric_args["high_95"]) / 2
        assert middle == pytest.approx(loss.metric_value, abs=2e-6)


@pytest.mark.parametrize(
    ("evaluation", "shares"),
    [
        ({}, ["exact_match"]),
        ({"metric_by_task": {SOURCES[0]: "json:loads"}}, ["exact_match"]),
        ({"metric_by_task": dict.fromkeys(SOURCES, "json:loads")}, []),
        ({"metric_by_task": dict.fromkeys(SOURCES, "numeric"), "lm_eval": {"tasks": ["x"]}}, "acc exact_match numeric"),
    ],
)
def test_shares_are_those_of_the_tasks_metrics_and_of_the_harness(
    recipe: dict[str, Any], pinned: PinnedRecipe, evaluation: dict[str, Any], shares: list[str] | str
):
    changed = parse_recipe({**recipe, "evaluation": {**recipe["evaluation"], **evaluation}})
    section = RELEASED.section(PinnedRecipe(changed, pinned.pins), {})
    assert section["shares"] == (shares.split() if isinstance(shares, str) else shares)


def test_card_cut_off_answers_are_those_of_the_scored_rows(readme: str, store: Store, manifests):
    found = rows(readme, "task | answers")
    assert [cells[0] for cells in found] == list(SOURCES)
    for task, answers, *shares in found:
        for model, share in zip(("base", "tuned"), shares, strict=True):
            flags = of_samples(read_rows(store.path(Ref(*manifests[f"{model}.{task}"]["ref"]))), "cut_off")
            assert (str(len(flags)), f"{sum(flags) / len(flags):.1%}") == (answers, share)


def test_card_lineage_leads_from_the_scores_to_the_files(readme: str, store: Store, manifests, pinned: PinnedRecipe):
    lineage = dict(rows(readme, "output | address"))
    refs = {name: Ref(*address.split("/")) for name, address in lineage.items() if "/" in address}
    assert len(refs) == 4 + 4 + 4 and all(store.has(ref) for ref in refs.values())
    inputs = {name: {Ref(*ref) for ref in store.manifest(at)["inputs"].values()} for name, at in refs.items()}
    for task in SOURCES:
        assert refs[f"tuned scores of {task}"] in inputs["report"]
        assert refs["checkpoint"] in inputs[f"tuned scores of {task}"]
        assert refs[f"tokens of {task}"] in inputs["mixture"]
        assert refs[f"conversations of {task}"] in inputs[f"tokens of {task}"]
        assert lineage[f"files of {task}"] == pinned.pins["sources"][task]
    assert refs["packs"] in inputs["checkpoint"] and refs["mixture"] in inputs["packs"]


def test_card_recipe_is_the_recipe_without_where_it_ran(readme: str, pinned: PinnedRecipe, tmp_path: Path):
    block = re.search(r"^```yaml\n(.*?)\n```$", readme, re.MULTILINE | re.DOTALL)
    assert block and str(ROOT) not in readme and str(tmp_path) not in readme
    data, whole = read_yaml(block[1]), pinned.recipe.as_written(exclude=("runtime", "hub"))
    keys = [
        "name",
        "id",
        "config",
        "split",
        "revision",
        "path",
        *(key for key in Dataset.model_fields if key != "name"),
    ]
    assert [list(dataset) for dataset in data["dataset_mixture"]["datasets"]] == [keys] * len(SOURCES)
    shown = parse_recipe(data).as_written(exclude=("runtime", "hub"))
    assert [dataset.pop("path") for dataset in shown["dataset_mixture"]["datasets"]] == [
        [f"{source}.jsonl"] for source in SOURCES
    ]
    for dataset in whole["dataset_mixture"]["datasets"]:
        del dataset["path"]
    assert shown["model"].pop("tokenizer_name_or_path") == "tokenizer"
    del whole["model"]["tokenizer_name_or_path"]
    assert shown == whole
    assert "**A smoke run**, on the first 60 rows" in readme


def test_release_is_the_checkpoint_that_was_scored_and_answers_by_its_cards_code(store: Store, released: Ref, readme):
    folder = store.path(released) / "model"
    trained = store.path(Ref(*store.manifest(released)["inputs"]["trained"])) / "model"
    files = {path.name: file_digest(path) for path in folder.iterdir()}
    assert files.pop("README.md") and files == {path.name: file_digest(path) for path in trained.iterdir()}
    code = re.search(r"^```python\n(.*?)\n```$", readme, re.MULTILINE | re.DOTALL)
    assert code and "enable_thinking=True,\n    header=False," in code[1]
    program = code[1].replace("max_new_tokens=256", "max_new_tokens=2")
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<|im_start|>user\nHello<|im_end|>")


def test_release_is_made_without_torch_and_of_links(store: Store, recipe: dict[str, Any], released: Ref):
    before = store.manifest(released)
    store.remove(released)
    code = """
import json, sys
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps.release import RELEASED
data = json.loads(sys.argv[1])
print(Store(data["runtime"]["store"]).ensure(RELEASED, pin(parse_recipe(data))), "torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, json.dumps(recipe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(released), "False"], done.stderr
    assert store.manifest(released)["content"] == before["content"], "the same bytes again"
    trained = Ref(*before["inputs"]["trained"])
    weights = [store.path(ref) / "model" / "model.safetensors" for ref in (released, trained)]
    assert weights[0].samefile(weights[1])
    store.verify(released)
    store.remove(trained)
    store.verify(released)


def test_release_removed_leaves_the_trained_output_whole(store: Store, released: Ref, manifests):
    store.remove(released)
    store.verify(Ref(*manifests["trained"]["ref"]))


def test_release_of_a_damaged_checkpoint_is_refused(store: Store, released: Ref, pinned: PinnedRecipe, manifests):
    store.remove(released)
    path = store.path(Ref(*manifests["trained"]["ref"])) / "model" / "config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"config\.json has \d+ bytes with another digest"):
        store.ensure(RELEASED, pinned)
    assert not store.has(released)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ("runtime.logging_steps=3", "hit"),
        ("hub.model_id=me/tiny", "hit"),
        ("name=other", "depends"),  # on the report, which has the name too
        ("evaluation.min_report_rows=1", "build"),
        ("dataset_mixture.max_repeats=2", "build"),
        ("training.learning_rate=1e-3", "depends"),
        ("evaluation.max_rows=5", "depends"),
    ],
)
def test_release_is_made_again_when_its_card_would_say_otherwise(store: Store, recipe, change: str, status: str):
    changed = pin(parse_recipe(override(recipe, (change,))))
    assert store.locate(RELEASED, changed, {}).status == status


def test_release_key_holds_the_model_the_scores_and_what_its_card_tells(store: Store, pinned, manifests):
    identity = store.locate(RELEASED, pinned, {}).identity
    assert identity["inputs"] == {name: manifest["content"] for name, manifest in manifests.items()}
    assert {"trained", "report", "packs", "mixture", *(f"tuned.{task}" for task in SOURCES)} <= identity[
        "inputs"
    ].keys()


def test_files_are_copied_where_no_link_can_be(tmp_path: Path):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system")
    source, target = tmp_path / "source", shared / f"sft-{tmp_path.name}-{tmp_path.parent.name}"
    (source / "adapter").mkdir(parents=True)
    (source / "adapter" / "weights").write_bytes(b"w" * 9)
    try:
        assert link_files(source, target) == (0, 1)
        assert (target / "adapter" / "weights").read_bytes() == b"w" * 9
    finally:
        shutil.rmtree(target, ignore_errors=True)


def test_files_a_librarys_readme_is_left_out_and_untouched(tmp_path: Path):
    for folder in (tmp_path / "source", tmp_path / "source" / "adapter"):
        folder.mkdir()
        (folder / "README.md").write_text("a library's")
        (folder / "config.json").write_text("{}")
    assert link_files(tmp_path / "source", tmp_path / "target", without="README.md") == (2, 2)
    assert [path.name for path in (tmp_path / "target").rglob("*") if path.is_file()] == ["config.json"] * 2
    (tmp_path / "target" / "README.md").write_text("ours")
    assert (tmp_path / "source" / "README.md").read_text() == "a library's"
