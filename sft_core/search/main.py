"""One rank of a roll-out: `python -m torch.distributed.run ... -m sft_core.search.main JOB.json`.

Trains as sft_core.train.main does, passes its measurements to the search, and writes curves.json and the weights of the
evaluations for which the search asks.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sft_core.data.packing.plan import PackPlan
from sft_core.die_with_parent import die_with_parent
from sft_core.evaluate.selection_answers import AnswerScores, AnswerSettings
from sft_core.search.job import RolloutJob
from sft_core.search.journal import CURVES, Cost, Drawn, Journal, read_journal, write_journal
from sft_core.search.registry import make_sampler, make_search
from sft_core.search.rollouts import Search, replay
from sft_core.search.strategy import SamplerInput, SearchInput
from sft_core.search.watch import RolloutWatch
from sft_core.train.hooks import Sampler
from sft_core.train.job import read_job
from sft_core.train.log_file import read_events
from sft_core.train.main import as_rank, trained


def main(job_path: Path) -> None:
    die_with_parent()
    job = read_job(RolloutJob, job_path)
    with as_rank(job.train.out):
        roll_out(job)


def roll_out(job: RolloutJob) -> None:
    """Trains, and writes curves.json and the weights for which the search asks."""
    out, search = job.train.out, search_of(job)
    trainer = trained(
        job.train,
        watch=functools.partial(RolloutWatch, search, job.rollout.tasks, job.train.spec.sources, out),
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


def search_of(job: RolloutJob) -> Search:
    """The search in its state before this roll-out."""
    rollout = job.rollout
    search = make_search(SearchInput(rollout.search, rollout.tasks, rollout.sizes))
    journal = []
    for folder in job.before:
        with (folder / CURVES).open() as file:
            journal.append(read_journal(file).curves)
    replay(search, journal)
    assert search.propose() is not None
    return search


def sampler_of(job: RolloutJob, plan: PackPlan, num_steps: int) -> Sampler | None:
    """The sampler of the roll-out's packs; None for a fixed schedule."""
    sources, training = job.train.spec.sources, job.train.spec.training
    tasks = [source for source in sources if source in job.rollout.active]
    number = {sources.index(task): place for place, task in enumerate(tasks)}
    return make_sampler(
        SamplerInput(
            job.rollout.search,
            tasks=tasks,
            task=np.array([number[source] for source in plan.source.tolist()]),
            plan=plan,
            num_steps=num_steps,
            num_epochs=training.num_train_epochs,
            global_batch_size=training.global_batch_size,
            max_length=job.rollout.max_length,
            seed=training.seed,
        )
    )


def answers_of(job: RolloutJob, plan: PackPlan, *, tokenizer: Any, flops_a_token: float) -> AnswerScores | None:
    """The scorer of answers to the selection rows; None where the rows' losses are the scores."""
    if job.rollout.answers is None:
        return None
    return AnswerScores(
        plan,
        job.train.spec.sources,
        job.train.tokens,
        {task: AnswerSettings(**settings) for task, settings in job.rollout.answers.items()},
        job.conversations,
        tokenizer,
        batch_size=job.train.runtime.eval_batch_size,
        flops_a_token=flops_a_token,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
