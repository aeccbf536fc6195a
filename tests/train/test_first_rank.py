"""On several ranks the first one alone reads and compares a checkpoint; the others go on from the one that it chose."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.digests import write_digests
from sft_core.store.store import Store
from sft_core.train.checkpoints import numbered, publish
from sft_core.train.continuation import Continuation
from steps.train import TRAINED
from tests.train.ranks import Attempt, error_of, opened, rank_that_notes_what_it_opens
from tests.train.tiny import LLAMA, tiny_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forkserver of Linux")
WITNESS = "witness"  # a file of a checkpoint that nothing opens but a comparison with the digests


def add_witness(checkpoint: Path) -> None:
    (checkpoint / WITNESS).write_bytes(b"seen")
    write_digests(checkpoint)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_resume_first_rank_reads_alone_and_all_go_on_from_the_whole_one(
    strategy: str, start_ranks: Callable[..., Attempt], tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        model={"config": {**LLAMA, "attention_dropout": 0.2}},  # so that the state of the random numbers matters
        training={"max_steps": 6},
        runtime={"save_steps": 2, "distributed": strategy},
    )
    assert start_ranks(recipe, tmp_path, 2).wait(120)
    weights = tmp_path / "model" / "model.safetensors"
    expected = weights.read_bytes()
    assert [path.name for path in numbered(tmp_path / "checkpoints")] == ["checkpoint-4", "checkpoint-6"]

    shutil.rmtree(tmp_path / "model")
    for checkpoint in numbered(tmp_path / "checkpoints"):
        add_witness(checkpoint)
    flip_bit(tmp_path / "checkpoints" / "checkpoint-6" / "trainer_state.json")
    assert start_ranks(recipe, tmp_path, 2, rank_that_notes_what_it_opens).wait(120)

    first, second = opened(tmp_path, 0), opened(tmp_path, 1)
    assert first.count("checkpoint-6/digests.json") == first.count(f"checkpoint-4/{WITNESS}") == 1
    assert "checkpoint-4/rng_state_1.pth" in second, "it went on from there too"
    assert not [name for name in second if name.startswith("checkpoint-6/") or name == f"checkpoint-4/{WITNESS}"]
    log = (tmp_path / "logs" / "ranks.log").read_text()
    assert log.count("checkpoint=checkpoint-6 is damaged and skipped") == 1
    assert log.count("resume checkpoint=checkpoint-4\n") == 1
    assert weights.read_bytes() == expected


@pytest.mark.slow
def test_best_checkpoint_is_read_by_the_first_rank_alone_and_a_damaged_one_ends_all(
    start_ranks: Callable[..., Attempt], tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        dataset_mixture={"selection_share": 0.2},
        evaluation={"during_training": {"every_epochs": 0.5, "max_rows": 12, "keep_best": True}},
        # It learns, then a rate that is far too high spoils it.
        training={"max_steps": 8, "learning_rate": 0.1, "lr_scheduler_type": "constant"},
    )
    assert start_ranks(recipe, tmp_path, 2).wait(120)
    weights = tmp_path / "model" / "model.safetensors"
    expected = weights.read_bytes()
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    best = tmp_path / "checkpoints" / f"checkpoint-{state['best_global_step']}"
    assert state["best_global_step"] < 8

    weights.unlink()
    add_witness(best)
    assert start_ranks(recipe, tmp_path, 2, rank_that_notes_what_it_opens).wait(120)
    assert opened(tmp_path, 0).count(f"{best.name}/{WITNESS}") == 1
    assert f"{best.name}/{WITNESS}" not in opened(tmp_path, 1)
    assert "checkpoint-8/optimizer.pt" in opened(tmp_path, 1)
    assert weights.read_bytes() == expected

    weights.unlink()
    flip_bit(best / WITNESS)
    assert start_ranks(recipe, tmp_path, 2).wait(120)
    assert error_of(tmp_path).count(f"{best}: the checkpoint of the lowest selection loss is damaged or missing") == 2
    assert not weights.exists()


@pytest.mark.slow
def test_error_of_the_first_rank_is_every_rank_s_and_the_launcher_s(store: Store, tmp_path: Path) -> None:
    pinned = pin(parse_recipe(tiny_recipe(training={"max_steps": 2}, runtime={"num_processes": 2})))
    located = store.locate(TRAINED, pinned, {"round": 0})
    assert located.ref is not None
    out = store.scratch(located.ref)
    staged = out / "staging" / "checkpoint-1"
    staged.mkdir(parents=True)
    Continuation("zero3", 2, logged=1, losses=[0.0, 0.0], sums=[[[0.0], [0.0]]] * 2).write(staged)
    publish(staged, out / "checkpoints", keep=2)
    with pytest.raises(RuntimeError, match=r"training failed \(exit code 1\)") as caught:
        store.ensure(TRAINED, pinned, round=0)
    told = "ValueError: runtime.distributed: found ddp, and checkpoint-1 was written under zero3 by 2 ranks; "
    assert str(caught.value).splitlines()[-1].startswith(told)
    errors = [path.read_text().splitlines()[-1] for path in sorted(out.glob("error-rank*.txt"))]
    assert errors and all(error.startswith(told) for error in errors)
    shutil.rmtree(out)  # whoever trains this recipe begins anew
