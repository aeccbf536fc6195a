"""A new way to share a model over ranks is an entry of the table and an accelerate config: nothing else changes."""

from pathlib import Path
from typing import Any

import pytest

from tests.strangers.project_copy import copy_project, run_json, run_python
from tests.train.tiny import tiny_recipe

TABLE = "sft_core/recipe/rank_strategies.py"
BEGIN_OF_TABLE = "    for strategy in (\n"
ENTRIES = """\
        RankStrategy(
            name="zero1",
            summary="ranks share the optimizer",
            shards=frozenset({"optimizer"}),
            engaged_as="DeepSpeedEngine, stage 1",
            master_weights=True,
            fixed_ranks=True,
            zero_stages=(1,),
        ),
        RankStrategy(
            name="pairs",
            summary="two ranks compute one model",
            shards=frozenset({"weights"}),
            engaged_as="DTensor",
            needs_gpu=True,
            ranks_a_pack=2,
            accelerate_types=("PAIRS",),
        ),
"""
CONFIGS = {
    "zero1": "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 1\n  offload_optimizer_device: none\n",
    "pairs": "distributed_type: MULTI_GPU\n",
}
FACTS = """
    import json, sys
    from pathlib import Path
    from sft_core.recipe.parse import parse_recipe
    from sft_core.train.accelerator import lost_updates, unmet_demands
    from sft_core.train.continuation import Continuation, resumable
    from sft_core.train.memory.estimate import bytes_a_parameter
    from sft_core.train.checkpoints import publish
    from sft_core.train.strategy import environment
    from steps.importer.recipe import import_recipe

    job = json.loads(sys.argv[1])

    def recipe(distributed="zero1", ranks=2, batch=4, nodes=1, search=None, dtype="float32", **training):
        data = json.loads(json.dumps(job["recipe"]))
        data["runtime"] |= {"distributed": distributed, "num_processes": ranks, "num_nodes": nodes}
        data["training"] |= {"global_batch_size": batch, **training}
        data["model"]["dtype"] = dtype
        if search is not None:
            data["search"] = search
            data["training"] = {"global_batch_size": batch, "lr_scheduler_type": "constant"}
        return parse_recipe(data)

    def error(function, *arguments, **options):
        try:
            function(*arguments, **options)
        except ValueError as caught:
            return str(caught)

    staged = Path(job["folder"]) / "staging" / "checkpoint-7"
    staged.mkdir(parents=True)
    Continuation("zero1", 2, logged=5, losses=[0.0] * 2, sums=[[[0.0], [0.0]]] * 2).write(staged)
    publish(staged, Path(job["folder"]) / "checkpoints", keep=2)
    accelerate = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}}
    imported = lambda accelerate: import_recipe(
        {"model_name_or_path": "a/b", "dataset_name": "c/d"}, output=Path("mine.yaml"), accelerate=accelerate
    )
    print(json.dumps({
        "unknown": error(recipe, "zero9"),
        "bytes": [bytes_a_parameter(made.last_phase.training, made.runtime) for made in (
            recipe(), recipe(bf16=True), recipe("pairs", bf16=True)
        )],
        "lora": bytes_a_parameter(recipe("pairs", lora={}).last_phase.training, recipe("pairs", lora={}).runtime),
        "environment": environment("zero1"),
        "resumed": resumable(Path(job["folder"]) / "checkpoints", "zero1", 2).name,
        "resume_error": error(resumable, Path(job["folder"]) / "checkpoints", "zero1", 4),
        "search": error(recipe, search={"strategy": "dynamix"}),
        "unmet": unmet_demands(recipe("pairs").for_phase("tuned"), on_gpu=False),
        "met": unmet_demands(recipe("zero1").for_phase("tuned"), on_gpu=False),
        "masters": [lost_updates(recipe(name, dtype="bfloat16").for_phase("tuned")) for name in ("ddp", "zero1")],
        "imported": imported(accelerate).get("runtime.distributed"),
        "imported_type": imported({"distributed_type": "PAIRS"}).get("runtime.distributed"),
        "not_imported": imported({"distributed_type": "TRIPLES"}).not_carried["accelerate config: distributed_type"],
        "ranks": [recipe("pairs", 4, nodes=2).runtime.num_ranks, recipe("pairs", 4, nodes=2).runtime.num_data_ranks],
        "batch_error": error(recipe, "pairs", 4, batch=1),
        "ranks_error": error(recipe, "pairs", 3, batch=3),
    }))
"""
TRAINING = """
    import json, sys
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe
    from sft_core.store.store import Store
    from sft_core.train.log_file import read_events
    from steps.train import TRAINED

    job = json.loads(sys.argv[1])
    store, pinned = Store(job["store"]), pin(parse_recipe(job["recipe"]))
    ref = store.ensure(TRAINED, pinned, round=0)
    logs = store.path(ref) / "logs"
    losses = [event["loss"] for event in read_events(logs / "log.jsonl")]
    ranks = [event["ranks"] for event in read_events(logs / "balance.jsonl")]
    print(json.dumps({"losses": losses, "ranks": ranks}))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with two more entries and their configs, and nothing else of it changed."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    text = (folder / TABLE).read_text()
    assert text.count(BEGIN_OF_TABLE) == 1
    (folder / TABLE).write_text(text.replace(BEGIN_OF_TABLE, BEGIN_OF_TABLE + ENTRIES))
    for name, config in CONFIGS.items():
        (folder / "configs" / "accelerate" / f"{name}.yaml").write_text(config)
    return folder


@pytest.fixture(scope="module")
def facts(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every part of the project that knows strategies says of the new ones."""
    job = {"recipe": tiny_recipe(), "folder": str(tmp_path_factory.mktemp("facts"))}
    return run_json(project, FACTS, job)


def test_strategy_entry_is_a_value_of_the_recipe_and_named_in_messages(facts: dict[str, Any]) -> None:
    assert "found 'zero9'; input should be 'zero1', 'pairs', 'ddp', 'fsdp2', 'zero2' or 'zero3'" in facts["unknown"]
    assert "needs a strategy that holds all weights on each rank: ddp" in facts["search"]
    assert facts["not_imported"].endswith("runtime.distributed is zero1, pairs, ddp, fsdp2, zero2 or zero3")
    assert facts["masters"][0].endswith("or runtime.distributed: zero1, zero2 or zero3") and facts["masters"][1] is None
    assert "runtime.distributed: pairs: needs a GPU" in facts["unmet"] and facts["met"] is None


def test_strategy_entry_is_known_to_the_estimate_to_checkpoints_and_to_imports(facts: dict[str, Any]) -> None:
    assert facts["bytes"] == [4 + 4 + 8 / 2, 2 + 2 + 12 / 2, 4 / 2 + 4 + 8]
    assert facts["lora"] == 4 / 2, "ranks that share the weights share a base without gradients too"
    assert facts["environment"]["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "1"
    assert facts["resumed"] == "checkpoint-7"
    assert (
        "checkpoint-7 was written under zero1 by 2 ranks; zero1 resumes only with that number" in facts["resume_error"]
    )
    assert (facts["imported"], facts["imported_type"]) == ("zero1", "pairs")


def test_strategy_of_ranks_that_share_a_pack_divides_the_batch_by_groups_of_ranks(facts: dict[str, Any]) -> None:
    assert facts["ranks"] == [8, 4]
    divisor = "runtime.num_nodes * runtime.num_processes / 2, for pairs computes each pack on 2 ranks (2)"
    assert f"training.global_batch_size: found 1; it is a multiple of {divisor}" in facts["batch_error"]
    assert facts["ranks_error"].startswith("runtime: num_nodes * num_processes is 3; pairs computes each pack on 2")


@pytest.mark.slow
def test_strategy_entry_is_planned_by_the_command(project: Path, small_recipe: dict[str, Any], save_recipe) -> None:
    small_recipe["runtime"] |= {"distributed": "zero1", "num_processes": 2}
    planned = run_python(
        project, "from steps.cli.main import main; main()", "plan", save_recipe(small_recipe), "--memory"
    )
    assert "parameters by zero1 on 2 rank(s)" in planned


@pytest.mark.long
def test_strategy_entry_trains_two_ranks(project: Path, tmp_path: Path) -> None:
    """Whether accelerate engages it is checked in each rank."""
    recipe = tiny_recipe(training={"max_steps": 4}, runtime={"distributed": "zero1", "num_processes": 2})
    result = run_json(project, TRAINING, {"recipe": recipe, "store": str(tmp_path / "store")})
    assert result["ranks"] == [2] and len(result["losses"]) == 4
    assert result["losses"][-1] < 0.95 * result["losses"][0]
