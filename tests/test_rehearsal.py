"""The rehearsal is configs/smollm3.yaml in small: its sources, its weights, its settings, and rows of its character."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_core.data.shards.token_shards import read_index
from sft_core.data.sources.read import accept
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import load_recipe, parse_recipe, read_yaml
from sft_core.recipe.recipe import Recipe
from sft_core.store.store import Store
from steps.deduplicate import DUPLICATES
from steps.mix import MIXTURE
from steps.pack import PACKED
from steps.plan import differences
from steps.report_prompts import check_report_prompts, count_report_prompts
from steps.tokenize import TOKENS, proved

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "configs" / "rehearsal" / "make_rehearsal.py"
OTHERWISE = {
    "name",
    "model.config",
    "model.model_name_or_path",
    "model.tokenizer_name_or_path",
    "model.trust_remote_code",
    "model.dtype",
    "evaluation.max_rows",
    "runtime.num_nodes",
    "runtime.num_processes",
    "runtime.store",
    "runtime.save_steps",
    "runtime.report_to",
    *(
        f"phases.{phase}.{key}"
        for phase in ("mid", "sft")
        for key in (
            "dataset_mixture.report_share",
            "packing.max_length",
            "training.learning_rate",
            "training.num_train_epochs",
            "training.global_batch_size",
            "training.bf16",
            "training.use_liger_kernel",
        )
    ),
}
TWINS = {
    "smoltalk_everyday_convs_reasoning_Qwen3_32B_think": "smoltalk_smollm3_everyday_conversations_no_think",
    "smoltalk_multilingual8_Qwen3_32B_think": "smoltalk_multilingual_8languages_lang_5_no_think",
    "OpenThoughts3_1.2M_think": "OpenThoughts3_1.2M_no_think_no_think",
    "LongAlign_64k_Qwen3_32B_yarn_131k_think": "LongAlign_64k_context_lang_annotated_lang_6_no_think",
    "table_gpt_Qwen3_32B_think": "table_gpt_no_think",
    "OpenThoughts3_1.2M": "OpenThoughts3_1.2M_think",
}
MID = ["Llama_Nemotron_Post_Training_Dataset_reasoning_r1", "OpenThoughts3_1.2M"]
LONG = ["LongAlign_64k_context_lang_annotated_lang_6_no_think", "LongAlign_64k_Qwen3_32B_yarn_131k_think"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(ROOT / "configs" / "rehearsal.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes."""
    return write(tmp_path_factory.mktemp("rehearsal"), hash_seed="1")


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: list(map(json.loads, path.read_text().splitlines())) for path in folder.glob("*.jsonl")}


def write(folder: Path, *, hash_seed: str) -> Path:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True, capture_output=True, env=environment)
    return folder


def small(folder: Path, store: Path, sources: list[str] | None = None, limit: int | None = None) -> PinnedRecipe:
    """The recipe over the script's files, of some sources and rows."""
    data = read_yaml((ROOT / "configs" / "rehearsal.yaml").read_text())
    data["model"]["tokenizer_name_or_path"] = str(folder / "tokenizer")
    for phase in [*data["phases"]]:
        mixture = data["phases"][phase]["dataset_mixture"]
        mixture["datasets"] = [one for one in mixture["datasets"] if sources is None or one["name"] in sources]
        for one in mixture["datasets"]:
            one["path"] = str(folder / Path(one["path"]).name)
        if not mixture["datasets"]:
            del data["phases"][phase]
    data["limit"] = limit
    data["runtime"] |= {"store": str(store), "num_workers": 1}
    return pin(parse_recipe(data))


def test_sources_columns_and_weights_are_smollm3s(recipe: Recipe) -> None:
    smollm3 = load_recipe(ROOT / "configs" / "smollm3.yaml")
    assert [*recipe.phases] == ["mid", "sft"] and recipe.phases["mid"].sources == MID and len(recipe.sources) == 27
    assert [(one.source, one.weight, one.columns) for one in recipe.datasets] == [
        (one.source, one.weight, one.columns) for one in smollm3.datasets
    ]
    assert all(Path(one.paths[0]).parent == Path("data/rehearsal") for one in recipe.datasets)


def test_settings_differ_from_smollm3_where_the_header_says_so_only(recipe: Recipe) -> None:
    smollm3 = load_recipe(ROOT / "configs" / "smollm3.yaml")
    ours, theirs = (one.as_written() for one in (recipe, smollm3))
    for data in (ours, theirs):
        del data["runtime"]["resources"]
        for phase in data["phases"].values():
            del phase["dataset_mixture"]["datasets"]
    assert {key for key, _, _ in differences(ours, theirs)} == OTHERWISE
    assert recipe.last_phase.training.global_batch_size // recipe.runtime.num_processes == 2, (
        "as smollm3's ranks accumulate"
    )


@pytest.mark.slow
def test_script_writes_the_same_bytes_again(folder: Path, tmp_path: Path) -> None:
    again = write(tmp_path, hash_seed="2")
    written = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(written) == 29
    for path in written:
        assert (again / path).read_bytes() == (folder / path).read_bytes(), path


def test_files_and_vocabulary_are_the_recipes(recipe: Recipe, folder: Path) -> None:
    names = {Path(one.paths[0]).name for one in recipe.datasets}
    assert {path.name for path in folder.glob("*.jsonl")} == names
    from sft_core.data.tokenizer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(
        path=str(folder / "tokenizer"),
        revision=None,
        add_special_tokens=[],
        eos_token=recipe.model.eos_token,
        trust_remote_code=False,
    )
    assert recipe.model.config and len(tokenizer) == recipe.model.config["vocab_size"]
    assert len(tokenizer.encode("<think>")) == len(tokenizer.encode("</tool_call>")) == 1


def test_every_row_is_accepted_and_thinks_where_its_split_does(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert len(rows) == 27
    for source, of_source in rows.items():
        assert 100 <= len(of_source) <= 600, source
        thinks = not source.endswith("_no_think")
        for row in of_source:
            conversation = json.loads(accept(row, "auto").conversation)
            answers = [one for one in conversation["messages"] if one["role"] == "assistant"]
            assert answers and all(("reasoning_content" in one) == thinks for one in answers), source
            if source in MID:
                assert set(row) == {"messages", "source"}
                continue
            assert row["chat_template_kwargs"]["enable_thinking"] == thinks
            assert set(row["chat_template_kwargs"]) == {
                "custom_instructions",
                "enable_thinking",
                "python_tools",
                "xml_tools",
            }


def test_splits_have_the_published_ones_character(rows: dict[str, list[dict[str, Any]]]) -> None:
    def holding(has: Any) -> set[str]:
        return {source for source, of_source in rows.items() if source not in MID and any(map(has, of_source))}

    assert holding(lambda row: row["chat_template_kwargs"]["xml_tools"]) == {
        "hermes_function_calling_v1_no_think",
        "xlam_traces_no_think",
    }
    assert holding(lambda row: row["chat_template_kwargs"]["python_tools"]) == {"smolagents_toolcalling_traces_think"}
    assert holding(lambda row: row["chat_template_kwargs"]["custom_instructions"]) == {
        "smoltalk_smollm3_systemchats_30k_no_think"
    }
    assert "smoltalk_systemchats_Qwen3_32B_think" in holding(lambda row: row["messages"][0]["role"] == "system")
    several = holding(lambda row: len(row["messages"]) > 4)
    assert {"multi_turn_reasoning_if_think", "smoltalk_smollm3_smol_magpie_ultra_no_think"} <= several
    foreign = holding(lambda row: any(character > "\u0400" for character in row["messages"][0]["content"]))
    assert len(foreign) == 3 and all("multilingual" in source or "aya" in source for source in foreign)
    tables = holding(lambda row: "|---|" in row["messages"][0]["content"])
    assert tables == {"table_gpt_no_think", "table_gpt_Qwen3_32B_think"}
    for think, no_think in TWINS.items():
        first, second = ([row["messages"][0] for row in rows[source][:100]] for source in (think, no_think))
        assert first == second, think


def test_every_task_has_report_prompts_enough(folder: Path, tmp_path: Path) -> None:
    pinned = small(folder, tmp_path / "store")
    counts = count_report_prompts(Store(tmp_path / "store"), pinned)
    assert len(counts) == 27
    check_report_prompts(counts, pinned)


@pytest.mark.slow
def test_mask_proof_holds_for_rows_of_every_source(folder: Path, tmp_path: Path) -> None:
    pinned = small(folder, tmp_path / "store", limit=12)
    store = Store(tmp_path / "store")
    for source in pinned.recipe.sources:
        counts = proved(store, store.ensure(TOKENS, pinned, source=source))
        assert counts.conversations == 12 and counts.rejected == 0, source
        assert counts.rows >= 12 and (counts.turns >= 12 or source in MID), source
        assert 0 < counts.trained_tokens <= counts.tokens, source
        assert (counts.trained_tokens == counts.tokens) == (source in MID), source


def test_long_rows_stand_near_max_length_and_over_it(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    pinned, store = small(folder, tmp_path / "store", LONG), Store(tmp_path / "store")
    max_length = recipe.last_phase.packing.max_length
    counts = store.manifest(store.ensure(PACKED, pinned))["counts"]
    for source in LONG:
        index = read_index(store.path(store.ensure(TOKENS, pinned, source=source)), ["num_tokens"])
        lengths = index["num_tokens"].to_numpy()
        assert ((lengths > 0.75 * max_length) & (lengths <= max_length)).any(), source
        assert (lengths < max_length / 2).sum() > len(lengths) / 2, source
        assert counts["truncated"][source] > 0 and counts["dropped"][source] > 0


def test_repeats_and_quoted_prompts_are_found(folder: Path, tmp_path: Path) -> None:
    exact, near = "OpenHermes_2.5_no_think", "smoltalk_smollm3_smol_summarize_no_think"
    sources = [exact, near, "OpenThoughts3_1.2M_no_think_no_think", "s1k_1.1_think"]
    pinned, store = small(folder, tmp_path / "store", sources), Store(tmp_path / "store")
    found = store.manifest(store.ensure(MIXTURE, pinned))["counts"]["sources"]
    repeats = store.manifest(store.ensure(DUPLICATES, pinned))["counts"]["sources"]
    assert repeats[exact]["exact"] > 0 and repeats[near]["near"] > 0
    assert found["OpenThoughts3_1.2M_no_think_no_think"]["contaminated"] > 0
    left = {name: one["available"] / one["train"] for name, one in found.items()}
    assert left.pop("s1k_1.1_think") > 0.6, "others quote a third of its problems"
    assert min(left.values()) > 0.7
