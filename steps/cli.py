"""The `sft` command: look at a recipe before a run, and at what a run left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from steps.painted import print_fault
from steps.store_commands import existing_store, store

WHOLE_LINE = 400  # characters
FLOW = Path(__file__).resolve().parent.parent / "flows" / "sft_flow.py"


class Commands(click.Group):
    """A user's mistake is one clear message, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if os.environ.get("SFT_TRACEBACK"):
                raise
            notes = "".join(f"\n({note})" for note in getattr(error, "__notes__", ()))
            if hasattr(error, "pieces") and print_fault(error):
                ctx.exit(1)
            raise click.ClickException(f"{error}{notes}") from None


def _overridable(command: Any) -> Any:
    command = click.option("--limit", type=int, help="Only the first rows of each source.")(command)
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")(command)


@click.group(cls=Commands)
def main() -> None:
    """From raw chat data to a scored checkpoint.

    A run itself is `python flows/sft_flow.py --config recipe RECIPE run`.
    """


@main.command()
@click.argument("recipe")
@_overridable
@click.option("--json", "as_json", is_flag=True, help="A JSON list of {stage, name, key, status}.")
@click.option(
    "--memory",
    is_flag=True,
    help="Try the model's class; estimate a GPU's memory and the FLOPs; slower.",
)
def plan(recipe: str, overrides: tuple[str, ...], limit: int | None, as_json: bool, memory: bool) -> None:
    """What a run would make and what is there already; builds nothing.

    \b
    Examples: sft plan configs/quickstart.yaml --set training.learning_rate=1e-3
              sft plan configs/tulu3-8b.yaml --memory
    """
    from sft_core.pins import pin
    from sft_core.report.tables import text_table
    from sft_core.store.store import Store
    from sft_core.train.accelerator import unmet_demands
    from steps import pipeline
    from steps.evaluate import check_report_prompts, count_report_prompts
    from steps.mix import SHARES_HEADER, planned_shares
    from steps.recipes import read_recipe

    loaded = read_recipe(recipe, overrides=overrides, limit=limit)
    pinned, store = pin(loaded, allow_unresolved=True), Store(loaded.runtime.store)
    prompts = count_report_prompts(store, pinned)
    check_report_prompts(prompts, pinned)
    found = pipeline.plan(store, pinned)
    rows = [
        {"stage": one.stage.name, "name": one.name, "key": one.ref.key if one.ref else None, "status": one.status}
        for one in found
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        pipeline.check_training(found, pinned)
        return
    click.echo(text_table(("stage", "name", "key", "status"), [tuple(row.values()) for row in rows]))
    for problem in pinned.unresolved:
        click.echo(f"no key yet for what hangs on {problem}", err=True)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("hit", "build", "depends")}
    click.echo(f"\n{counts['hit']} are there, {counts['build']} to build, {counts['depends']} depend on one to build")
    known = [count for count in prompts.values() if count is not None]
    if known:
        click.echo(f"unique report prompts a task: {min(known)} to {max(known)}")
    problems: list[str] = []
    for phase in loaded.phases:
        shares, of_phase = planned_shares(store, pinned, phase)
        problems += of_phase
        click.echo(("" if len(loaded.phases) == 1 else f"\nphase {phase}") + "\n" + text_table(SHARES_HEADER, shares))
    unmet = {unmet_demands(loaded.for_phase(phase)) for phase in loaded.phases} | {pipeline.unmet_engine(found, loaded)}
    for problem in [*problems, *filter(None, unmet), *_of_model(found, pinned, tries=memory)]:
        click.echo(problem, err=True)
    if memory:
        for line in pipeline.estimated(store, pinned, found):
            click.echo(f"\n{line}")
    pipeline.check_training(found, pinned)


def _of_model(planned: Any, pinned: Any, *, tries: bool) -> list[str]:
    """What a plan says of the model. What a run would refuse stands there as well: a plan is for other machines too."""
    from sft_core.store.stage import Unresolved
    from steps.pipeline import model_told

    try:
        return model_told(planned, pinned, tries=tries)
    except Unresolved:
        return []  # told already
    except (OSError, ValueError) as error:
        return [str(error)]


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--store", "root", default="store", show_default=True, help="The store, a folder or a URL, for outputs.")
def explain(a: str, b: str, root: str) -> None:
    """Why two outputs (stage/key) or the outputs of two recipes have different keys.

    \b
    Examples: sft explain trained/3f2a trained/91bc
              sft explain configs/quickstart.yaml mine.yaml
    """
    from steps.explain import explained

    click.echo("\n".join(explained(a, b, root)) or "no difference")


@main.command()
@click.argument("recipe")
@click.option("--source", required=True, help="A source's name.")
@click.option("--row", default=0, show_default=True, help="The row's number, from 0.")
@_overridable
def show(recipe: str, source: str, row: int, overrides: tuple[str, ...], limit: int | None) -> None:
    """A row as the model sees it: trained tokens green, masked ones dim, control tokens reversed.

    Builds the source's tokens when they are not there.

    \b
    Example: sft show configs/quickstart.yaml --source copy_no_think --row 3
    """
    from steps.show import show_row

    show_row(recipe, source, row, overrides, limit)


@main.command()
@click.argument("recipe")
@_overridable
@click.option("--json", "as_json", is_flag=True, help="A JSON list, an object for each source.")
def check(recipe: str, overrides: tuple[str, ...], limit: int | None, as_json: bool) -> None:
    """Hold every row's mask against its conversation, and print what was checked.

    Builds the sources' tokens when they are not there, which proves them; of those that are, the shards are compared
    with their digests. A row that trains anything else than what its assistant says ends it, with the row in colour.

    \b
    Example: sft check configs/quickstart.yaml --limit 200
    """
    from sft_core.pins import pin
    from sft_core.store.store import Store
    from steps.check import check_text, checked
    from steps.recipes import read_recipe

    loaded = read_recipe(recipe, overrides=overrides, limit=limit)
    pinned, store = pin(loaded), Store(loaded.runtime.store)
    rows = [checked(store, pinned, source) for source in loaded.sources]
    click.echo(json.dumps(rows, indent=1) if as_json else check_text(rows))


@main.command()
@click.argument("ref", required=False)
@click.option("--store", "root", default="store", show_default=True, help="The store: a folder or a URL.")
def verify(ref: str | None, root: str) -> None:
    """Compare the files of an output, or of every output, with the digests in its manifest.

    \b
    Example: sft verify tokens/3f2a
    """
    from tqdm import tqdm

    from sft_core.store.manifest import CorruptOutput

    store = existing_store(root)
    refs = [store.find(ref)] if ref else store.refs()
    faults = []
    for one in tqdm(refs, unit=" outputs", disable=None):
        try:
            store.verify(one, remote=True)
        except CorruptOutput as fault:
            faults.append(str(fault))
    click.echo("\n".join([*faults, f"{len(refs)} outputs verified, {len(faults)} damaged"]))
    sys.exit(1 if faults else 0)


@main.command()
@click.option("--all", "whole", is_flag=True, help="Every score with its standard error: perplexity, token accuracy.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of every score, an object each.")
def scores(whole: bool, as_json: bool) -> None:
    """The scores of the last run that finished.

    \b
    Examples: sft scores --all
              sft scores --json
    """
    from steps.report import summary
    from steps.runs import last_finished

    data = last_finished()
    click.echo(json.dumps(data["scores"], indent=1) if as_json else summary(**data, whole=whole).strip())


@main.command()
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

    from steps.answers import answers, as_text
    from steps.runs import recorded

    found = answers(recorded(run), task, only)
    for row in islice(found, limit):
        if as_json:
            click.echo(json.dumps(row, ensure_ascii=False))
        else:
            _console().print(as_text(row))
    if left := sum(1 for _ in found):
        click.echo(f"{left} rows more; --limit", err=True)


@main.command()
def resume() -> None:
    """Continue the last attempt, a resumed one that failed included: finished steps are not run again.

    \b
    Example: sft resume
    """
    from sft_core.store.provenance import source_code
    from steps.runs import failed_tasks, last_attempt
    from steps.tags import resumed_tags

    run = last_attempt()
    failed = failed_tasks(run.id)
    # To Metaflow a failed evaluation is done. From the step on, those that are scored are hits.
    step = ["evaluate"] if failed else []
    click.echo(f"resuming {run.id}" + (f", evaluating {', '.join(failed)} again" if failed else ""))
    # The step that tags a run is finished, so it is not run again.
    tags = [part for tag in resumed_tags(run.tags, source_code()) for part in ("--tag", tag)]
    sys.exit(subprocess.call([sys.executable, str(FLOW), "resume", *step, "--origin-run-id", run.id, *tags]))


@main.command()
@click.option("--model", required=True, help="A hub id or a folder.")
@click.option("--data", required=True, multiple=True, help="A file, glob or hub dataset id; may be repeated.")
@click.option("--output", default="recipe.yaml", show_default=True, help="Where to write the recipe.")
def init(model: str, data: tuple[str, ...], output: str) -> None:
    """Write a recipe with comments for a model and data.

    \b
    Example: sft init --model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl
    """
    from steps.new_recipe import write_recipe

    write_recipe(model, data, Path(output))
    click.echo(f"wrote {output}\n\n  sft plan {output}\n  python flows/sft_flow.py --config recipe {output} run")


@main.command("import")
@click.argument("recipe")
@click.option("--output", default="recipe.yaml", show_default=True, help="Where to write the recipe.")
@click.option(
    "--num-processes",
    type=click.IntRange(min=1),
    help="Ranks that the other recipe was run with; its batch is for each. Default: accelerate's config's, or 1.",
)
@click.option("--accelerate-config", help="The config that the other recipe was launched with.")
def import_recipe(recipe: str, output: str, num_processes: int | None, accelerate_config: str | None) -> None:
    """Turn a recipe of the alignment-handbook or TRL (`trl sft --config`) into one of ours.

    Says for each of its keys whether it is carried, carried with a change, or not, and why.

    \b
    Example: sft import sft.yaml --output mine.yaml --num-processes 64
    """
    from steps.import_recipe import write_imported
    from steps.import_text import account_text

    launched = Path(accelerate_config) if accelerate_config else None
    found = write_imported(Path(recipe), Path(output), num_processes, launched)
    beside = f" and {Path(output).with_suffix('.jinja')}" if found.template is not None else ""
    click.echo(f"{account_text(found)}\n\nwrote {output}{beside}\n\n  sft plan {output}")


@main.command()
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
    conversation, /help tells the commands.

    \b
    Examples: sft chat latest
              sft chat trained/3f2a --temperature 0.7 --top-p 0.9
              sft chat store/release/3f2a/model --prompt "sort: dbca" --no-think
              sft chat org/model < questions.txt
    """
    from sft_core.evaluate.chat import Sampling
    from sft_core.recipe import read_yaml
    from steps.chat import talk

    variables = {}
    for one in kwargs:
        name, is_given, value = one.partition("=")
        if not is_given:
            raise ValueError(f"--template-kwarg: found {one!r}; write NAME=VALUE, as header=false")
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


@main.command()
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
    from steps.compare import as_tables, compared
    from steps.runs import recorded

    found = compared(recorded(run_a), recorded(run_b))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _console().print(*as_tables(found), sep="\n")


@main.command()
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
    from steps import lineage, row_journey

    store, found = lineage.find(ref, root)
    traced = lineage.trace(store, found)
    if row_id is not None:
        journeys = row_journey.journeys(store, traced, row_id)
        told: Any = journeys
        trees = [row_journey.as_tree(journey) for journey in journeys]
    else:
        told, trees = lineage.as_json(store, traced), [lineage.as_tree(store, traced)]
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        _console().print(*trees, sep="\n")


def _console() -> Any:
    """Lines are folded in a terminal and whole elsewhere."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WHOLE_LINE)


main.add_command(store)


if __name__ == "__main__":
    main()
