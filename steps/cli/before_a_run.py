"""Commands for a recipe, before a run: plan, explain, show, check, init, import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steps.cli.say import say

if TYPE_CHECKING:
    from sft_core.pins.pinned import PinnedRecipe
    from sft_core.store.stage import Located


def _overridable(command: Any) -> Any:
    command = click.option("--limit", type=int, help="Only the first rows of each source.")(command)
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")(command)


@click.command()
@click.argument("recipe")
@_overridable
@click.option("--json", "as_json", is_flag=True, help="A JSON list of {stage, name, key, status}.")
@click.option(
    "--memory",
    is_flag=True,
    help="Try what training needs, as start does; estimate a GPU's memory and the FLOPs; slower.",
)
def plan(recipe: str, overrides: tuple[str, ...], limit: int | None, as_json: bool, memory: bool) -> None:
    """The outputs that a run would make, and those that are there; builds nothing.

    \b
    Examples: sft plan configs/quickstart.yaml --set training.learning_rate=1e-3
              sft plan configs/tulu3-8b.yaml --memory
    """
    from sft_core.pins.pinned import pin
    from sft_core.report.tables import text_table
    from sft_core.store.store import Store
    from sft_core.train.accelerator import unmet_demands
    from steps import start
    from steps.mix import SHARES_HEADER, planned_shares
    from steps.plan import drifts, estimated
    from steps.plan import plan as planned_outputs
    from steps.report_prompts import check_report_prompts, count_report_prompts
    from steps.runs.recipes import read_recipe
    from steps.toy import rendering_warnings
    from steps.verdict import verdict_lines

    loaded = read_recipe(recipe, overrides=overrides, limit=limit)
    pinned, store = pin(loaded, allow_unresolved=True), Store(loaded.runtime.store)
    prompts = count_report_prompts(store, pinned)
    check_report_prompts(prompts, pinned)
    planned = planned_outputs(store, pinned)
    rows = [
        {
            "stage": located.stage.name,
            "name": located.name,
            "key": located.ref.key if located.ref else None,
            "status": located.status,
        }
        for located in planned
    ]
    if as_json:
        say(json.dumps(rows, indent=1))
        start.check_training(planned, pinned)
        return
    say(text_table(("stage", "name", "key", "status"), [tuple(row.values()) for row in rows]))
    for problem in pinned.unresolved:
        say(f"cannot compute keys that depend on {problem}", err=True)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("hit", "build", "depends")}
    say(f"\n{counts['hit']} are there, {counts['build']} to build, {counts['depends']} depend on one to build")
    known = [count for count in prompts.values() if count is not None]
    if known:
        say(f"unique report prompts a task: {min(known)} to {max(known)}")
    problems: list[str] = []
    for phase in loaded.phases:
        shares, of_phase = planned_shares(store, pinned, phase)
        problems += of_phase
        say(("" if len(loaded.phases) == 1 else f"\nphase {phase}") + "\n" + text_table(SHARES_HEADER, shares))
    problems += drifts(store, pinned, planned)
    unmet = {unmet_demands(loaded.for_phase(phase)) for phase in loaded.phases} | {start.unmet_engine(planned, loaded)}
    for problem in [*problems, *filter(None, unmet), *_of_model(planned, pinned)]:
        say(problem, err=True)
    for line in verdict_lines(store, pinned, planned, tries=memory):
        say(line, err=True)
    if memory:
        for line in estimated(store, pinned, planned):
            say(f"\n{line}")
    start.check_training(planned, pinned)
    for warning in rendering_warnings(planned, pinned, fetches=False):
        say(warning, err=True)


def _of_model(planned: list[Located], pinned: PinnedRecipe) -> list[str]:
    """A plan's warnings about the model. An error of it is a warning here: the run may be on another machine."""
    from sft_core.store.stage import Unresolved
    from steps.start import model_warnings

    try:
        return model_warnings(planned, pinned)
    except Unresolved:
        return []  # the plan reports the unresolved name
    except (OSError, ValueError) as error:
        return [str(error)]


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--store", "root", default="store", show_default=True, help="The store, a folder or a URL, for outputs.")
def explain(a: str, b: str, root: str) -> None:
    """Why two outputs (stage/key) or the outputs of two recipes have different keys.

    \b
    Examples: sft explain trained/3f2a trained/91bc
              sft explain configs/quickstart.yaml mine.yaml
    """
    from steps.cli.explain import explained

    say("\n".join(explained(a, b, root)) or "no difference")


@click.command()
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
    from steps.cli.show import show_row

    show_row(recipe, source, row, overrides, limit)


@click.command()
@click.argument("recipe")
@_overridable
@click.option("--json", "as_json", is_flag=True, help="A JSON list, an object for each source.")
def check(recipe: str, overrides: tuple[str, ...], limit: int | None, as_json: bool) -> None:
    """Hold every row's mask against its conversation, and print what was checked.

    Builds the sources' tokens when they are not there, which proves them; compares the shards of the others with their
    digests. Fails at the first row that trains anything but what its assistant says, and shows that row in colour.

    \b
    Example: sft check configs/quickstart.yaml --limit 200
    """
    from sft_core.pins.pinned import pin
    from sft_core.store.store import Store
    from steps.cli.check import check_text, checked
    from steps.runs.recipes import read_recipe

    loaded = read_recipe(recipe, overrides=overrides, limit=limit)
    pinned, store = pin(loaded), Store(loaded.runtime.store)
    rows = [checked(store, pinned, source) for source in loaded.sources]
    say(json.dumps(rows, indent=1) if as_json else check_text(rows))


@click.command()
@click.option("--model", required=True, help="A hub id or a folder.")
@click.option("--data", required=True, multiple=True, help="A file, glob or hub dataset id; may be repeated.")
@click.option("--output", default="recipe.yaml", show_default=True, help="Where to write the recipe.")
def init(model: str, data: tuple[str, ...], output: str) -> None:
    """Write a recipe with comments for a model and data.

    \b
    Example: sft init --model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl
    """
    from steps.cli.init import write_recipe

    write_recipe(model, data, Path(output))
    say(f"wrote {output}\n\n  sft plan {output}\n  python flows/sft_flow.py --config recipe {output} run")


@click.command("import")
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

    Lists each of its keys: carried, carried with a change, or not carried, and why.

    \b
    Example: sft import sft.yaml --output mine.yaml --num-processes 64
    """
    from steps.importer.recipe import write_imported
    from steps.importer.text import account_text

    launched = Path(accelerate_config) if accelerate_config else None
    imported = write_imported(Path(recipe), Path(output), num_processes, launched)
    beside = f" and {Path(output).with_suffix('.jinja')}" if imported.template is not None else ""
    say(f"{account_text(imported)}\n\nwrote {output}{beside}\n\n  sft plan {output}")


COMMANDS = (plan, explain, show, check, init, import_recipe)
