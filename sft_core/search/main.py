"""One rank of a roll-out: `python -m torch.distributed.run ... -m sft_core.search.main JOB.json`.

Trains as sft_core.train.main does, shows a search what it measures, and writes curves.json and the weights of those
evaluations that the search asks for.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sft_core.data.packing import PackPlan
from sft_core.evaluate.selection_answers import AnswerScores
from sft_core.search.journal import CURVES, Cost, Drawn, Journal, read_journal, write_journal
from sft_core.search.rollouts import Search, replay
from sft_core.search.samplers import Sampler, make_sampler
from sft_core.search.strategies import make_search
from sft_core.search.watch import RolloutWatch
from sft_core.train.log_file import read_events
from sft_core.train.main import main, trained


def roll_out(job: dict[str, Any], out: Path) -> None:
    """Trains, and writes what the search asks for."""
    tasks, search = job["rollout"]["tasks"], search_of(job["rollout"])
    trainer = trained(
        job,
        out,
        watch=functools.partial(RolloutWatch, search, tasks, job["sources"], out),
        sampler=functools.partial(sampler_of, job),
        answers=functools.partial(answers_of, job),
    )
    if trainer.accelerator.is_main_process:
        assert trainer.selection is not None and isinstance(trainer.selection.watch, RolloutWatch)
        watch = trainer.selection.watch
        watch.keep_only(search.kept(watch.curves))
        training, evaluation = trainer.flops()
        cost = Cost(training, evaluation, watch.most_kept, watch.checkpoint_bytes)
        drawn = [
            Drawn(event["step"] / watch.steps_per_epoch, event["shares"])
            for event in read_events(out / "logs" / "online.jsonl")
        ]
        write_journal(out, Journal(watch.curves, cost, drawn))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def search_of(rollout: dict[str, Any]) -> Search:
    """The search as it stands before this roll-out."""
    search = make_search(rollout["search"], rollout["tasks"], rollout["sizes"])
    journal = []
    for folder in rollout["before"]:
        with (Path(folder) / CURVES).open() as file:
            journal.append(read_journal(file).curves)
    replay(search, journal)
    assert search.propose() is not None
    return search


def sampler_of(job: dict[str, Any], plan: PackPlan, num_steps: int) -> Sampler | None:
    """Who draws what the roll-out trains; None where its schedule stands from the start."""
    rollout, training = job["rollout"], job["training"]
    tasks = [source for source in job["sources"] if source in rollout["active"]]
    number = {job["sources"].index(task): place for place, task in enumerate(tasks)}
    return make_sampler(
        rollout["search"],
        tasks=tasks,
        task=np.array([number[source] for source in plan.source.tolist()]),
        plan=plan,
        num_steps=num_steps,
        num_epochs=training["num_train_epochs"],
        global_batch_size=training["global_batch_size"],
        max_length=rollout.get("max_length"),
        seed=training["seed"],
    )


def answers_of(job: dict[str, Any], plan: PackPlan, *, tokenizer: Any, flops_a_token: float) -> AnswerScores | None:
    """Who scores the answers to the selection rows; None where their losses are the scores."""
    if "answers" not in job["rollout"]:
        return None
    return AnswerScores(
        plan,
        job["sources"],
        [list(map(Path, folders)) for folders in job["tokens"]],
        job["rollout"]["answers"],
        {task: Path(folder) for task, folder in job["rollout"]["conversations"].items()},
        tokenizer,
        batch_size=job["runtime"]["eval_batch_size"],
        flops_a_token=flops_a_token,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), roll_out)
