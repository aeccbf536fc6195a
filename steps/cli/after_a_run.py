"""Commands for what a run left: verify, scores, answers, resume, chat, compare, lineage."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from steps.cli.say import say, say_painted
from steps.cli.store import existing_store

WHOLE_LINE = 400  # characters
FLOW = Path(__file__).resolve().parents[2] / "flows" / "sft_flow.py"


@click.command()
@click.argument("ref", required=False)
@click.option("--store", "root", default="store", show_default=True, help="The store: a folder or a URL.")
def verify(ref: str | None, root: str) -> None:
    """Compare the files of an output, or of every output, with the digests in its manifest.

    Outputs that were made from a damaged one are named. They are right unless the damage is older than they are, and
    every build verifies what it reads; `sft store gc --damaged` removes both.

    \b
    Example: sft verify tokens/3f2a
    """
    from steps.cli.damage import find_damage

    store = existing_store(root)
    refs = [store.find(ref)] if ref else store.refs()
    damage = find_damage(store, refs)
    faults = [str(fault) for fault in damage.faults.values()]
    derived = [
        f"{output}: was made from damaged {', '.join(map(str, behind))}" for output, behind in damage.derived.items()
    ]
    foreign = [f"{output}: {name} is not of the output" for output in damage.whole for name in store.foreign(output)]
    say("\n".join([*faults, *derived, *foreign, f"{len(refs)} outputs verified, {len(faults)} damaged"]))
    sys.exit(1 if faults else 0)


@click.command()
@click.option("--all", "whole", is_flag=True, help="Every score with its standard error: perplexity, token accuracy.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of every score, an object each.")
def scores(whole: bool, as_json: bool) -> None:
    """The scores of the last run that finished.

    \b
    Examples: sft scores --all
              sft scores --json
    """
    from steps.report import summary
    from steps.runs.recorded import last_finished

    run = last_finished()
    if as_json:
        say(json.dumps(run.scores, indent=1))
    else:
        say_painted(summary(run.scores, run.gains, run.checkpoint, run.pushed, whole).strip())


@click.command()
@click.argument("run")
@click.option("--task", help="Of this task only.")
@click.option("--only", type=click.Choice(["won", "lost", "same"]), help="Rows that tuning won, lost, or left alike.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Rows at most.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line.")
def answers(run: str, task: str | None, only: Any, limit: int, as_json: bool) -> None:
    """What base and tuned model answered in a run, row by row: those won first, then those lost, then the others.

    \b
    Examples: sft answers latest
              sft answers latest --task gsm_symbolic_think --only lost
              sft answers 1795362982054539 --limit 100000 --json > answers.jsonl
    """
    from itertools import islice

    from sft_core.report.shown import in_json
    from steps.cli.answers import answers, as_text
    from steps.runs.recorded import recorded

    rows = answers(recorded(run), task, only)
    for row in islice(rows, limit):
        if as_json:
            say(in_json(json.dumps(row, ensure_ascii=False)))
        else:
            _console().print(as_text(row))
    if num_more := sum(1 for _ in rows):
        say(f"{num_more} rows more; --limit", err=True)


@click.command()
def resume() -> None:
    """Continue the last attempt, a resumed one that failed included: finished steps are not run again.

    \b
    Example: sft resume
    """
    from sft_core.store.provenance import source_code
    from steps.runs.older import check_resumable
    from steps.runs.recorded import failed_tasks, last_attempt
    from steps.runs.tags import resumed_tags

    run = last_attempt()
    check_resumable(run, FLOW)
    failed = failed_tasks(run.id)
    # Metaflow takes a failed evaluation for done. Resume from its step: the scores that are there are hits.
    step = ["evaluate"] if failed else []
    say(f"resuming {run.id}" + (f", evaluating {', '.join(failed)} again" if failed else ""))
    # `start` tags a run, and a resume does not run it again.
    tags = [part for tag in resumed_tags(run, source_code()) for part in ("--tag", tag)]
    command = [sys.executable, str(FLOW), "resume", *step, "--origin-run-id", run.id, *tags]
    sys.stdout.flush()
    os.execv(command[0], command)  # in place of this process, so that signals reach the scheduler


@click.command()
@click.argument("ref")
@click.option("--prompt", help="One turn: prints its answer and ends. Otherwise turns are typed, or piped in by line.")
@click.option("--system", help="The system message.")
@click.option("--no-think", is_flag=True, help="Start without thinking; /think and /no_think switch.")
@click.option("--temperature", type=float, help="0 is greedy. Default: as the checkpoint's generation config says.")
@click.option("--top-p", type=float, help="Sample from the likeliest tokens of this share of the probability.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Of an answer.")
@click.option("--seed", default=0, show_default=True, help="Of sampling.")
@click.option("--template-kwarg", "kwargs", multiple=True, metavar="NAME=VALUE", help="A variable of the template.")
@click.option("--trust-remote-code", is_flag=True, help="Run a model's own code, where it brings some.")
@click.option("--store", "root", default="store", show_default=True, help="The store, for outputs: a folder or a URL.")
def chat(
    ref: str,
    prompt: str | None,
    system: str | None,
    no_think: bool,
    temperature: float | None,
    top_p: float | None,
    max_new_tokens: int,
    seed: int,
    kwargs: tuple[str, ...],
    trust_remote_code: bool,
    root: str,
) -> None:
    """Talk to a checkpoint: an output (stage/key), a run's id or `latest`, a folder, or a hub id.

    Its own chat template writes the prompts, with the kwargs that the store knows it was trained with. In the
    conversation, /help tells the commands. A terminal shows the control characters of an answer as symbols; a pipe or a
    file gets the answer as the model wrote it.

    \b
    Examples: sft chat latest
              sft chat trained/3f2a --temperature 0.7 --top-p 0.9
              sft chat store/release/3f2a/model --prompt "sort: dbca" --no-think
              sft chat org/model < questions.txt
    """
    from sft_core.evaluate.chat import Sampling
    from sft_core.recipe.parse import read_yaml
    from steps.cli.chat import talk

    variables = {}
    for text in kwargs:
        name, is_given, value = text.partition("=")
        if not is_given:
            raise ValueError(f"--template-kwarg: found {text!r}; write NAME=VALUE, as header=false")
        variables[name] = read_yaml(f"value: {value}")["value"]
    code = talk(
        ref,
        root,
        sampling=Sampling(max_new_tokens, temperature, top_p, seed),
        system=system,
        thinking=False if no_think else None,
        prompt=prompt,
        kwargs=variables,
        trust_remote_code=trust_remote_code,
    )
    sys.exit(code)


@click.command()
@click.argument("run_a")
@click.argument("run_b")
@click.option("--json", "as_json", is_flag=True, help="A JSON object: runs, recipe, amounts, scores.")
def compare(run_a: str, run_b: str, as_json: bool) -> None:
    """Two runs side by side: their recipes' differences, data, training and scores. `latest` is the newest run.

    Scores of the tuned models are also compared by row, with a 95 % interval, where both scored the same prompts.

    \b
    Examples: sft compare 1795362982054539 latest
              sft compare 1795362982054539 1795363110646365 --json
    """
    from steps.cli.compare import as_tables, compared
    from steps.runs.recorded import recorded

    comparison = compared(recorded(run_a), recorded(run_b))
    if as_json:
        say(json.dumps(comparison, indent=1))
    else:
        _console().print(*as_tables(comparison), sep="\n")


@click.command()
@click.argument("ref")
@click.option("--row", "row_id", help="The way of the row with this row_id, to its packs and steps.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object: root, outputs, removed; with --row a list.")
@click.option("--store", "root", default="store", show_default=True, help="The store, for outputs: a folder or a URL.")
def lineage(ref: str, row_id: str | None, as_json: bool, root: str) -> None:
    """What an output (stage/key), or a run's report, was made from, back to the source files.

    With each output: the digest of its content, when it was made, and by which commit of this project.

    \b
    Examples: sft lineage latest
              sft lineage trained/3f2a --json
              sft lineage latest --row 0bf565fb06cb45b5
    """
    from steps.cli import lineage, row_journey

    store, output = lineage.find(ref, root)
    traced = lineage.trace(store, output)
    if row_id is not None:
        journeys = row_journey.journeys(store, traced, row_id)
        data: Any = journeys
        trees = [row_journey.as_tree(journey) for journey in journeys]
    else:
        data, trees = lineage.as_json(store, traced), [lineage.as_tree(store, traced)]
    if as_json:
        say(json.dumps(data, indent=1))
    else:
        _console().print(*trees, sep="\n")


def _console() -> Any:
    """Lines are folded in a terminal and whole elsewhere."""
    from steps.console import TextConsole

    console = TextConsole()
    return console if console.is_terminal else TextConsole(width=WHOLE_LINE)


COMMANDS = (verify, scores, answers, resume, chat, compare, lineage)
