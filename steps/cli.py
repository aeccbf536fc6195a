"""The `sft` command: look at a recipe before a run, and at what a run left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steps.painted import print_fault

if TYPE_CHECKING:
    from sft_core.store import Store

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
@click.option("--memory", is_flag=True, help="Estimate a GPU's memory and the FLOPs of training; slower.")
def plan(recipe: str, overrides: tuple[str, ...], limit: int | None, as_json: bool, memory: bool) -> None:
    """What a run would make and what is there already; builds nothing.

    \b
    Examples: sft plan configs/quickstart.yaml --set training.learning_rate=1e-3
              sft plan configs/tulu3-8b.yaml --memory
    """
    from sft_core.pins import pin
    from sft_core.recipe import load_recipe
    from sft_core.report.tables import text_table
    from sft_core.store import Store
    from sft_core.train.accelerator import lost_updates, unmet_demands
    from steps import pipeline
    from steps.evaluate import check_report_prompts, count_report_prompts
    from steps.mix import SHARES_HEADER, planned_shares

    loaded = load_recipe(recipe, overrides=overrides, limit=limit)
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
    shares, problems = planned_shares(store, pinned)
    click.echo("\n" + text_table(SHARES_HEADER, shares))
    for problem in [*problems, *filter(None, (unmet_demands(loaded), lost_updates(loaded)))]:
        click.echo(problem, err=True)
    if memory and (estimate := pipeline.estimated(store, pinned, found)):
        click.echo(f"\n{estimate}")
    pipeline.check_training(found, pinned)


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
    from steps import pipeline

    pairs = _recipe_identities(a, b) if Path(a).is_file() and Path(b).is_file() else _output_identities(a, b, root)
    told = False
    for name, before, after in pairs:
        lines = [f"  {key}: {_short(old)} -> {_short(new)}" for key, old, new in pipeline.differences(before, after)]
        if lines:
            click.echo("\n".join([name, *lines]))
            told = True
    if not told:
        click.echo("no difference")


def _recipe_identities(a: str, b: str) -> list[tuple[str, Any, Any]]:
    from sft_core.pins import pin
    from sft_core.recipe import load_recipe
    from sft_core.store import Store
    from steps import pipeline

    sides = []
    for path in (a, b):
        loaded = load_recipe(path)
        found = pipeline.plan(Store(loaded.runtime.store), pin(loaded, allow_unresolved=True))
        sides.append({f"{one.stage.name} {one.name}": one.identity for one in found})
    before, after = sides
    return [(name, before.get(name, {}), after.get(name, {})) for name in dict.fromkeys([*before, *after])]


def _output_identities(a: str, b: str, root: str) -> list[tuple[str, Any, Any]]:
    store = _existing_store(root)
    refs = [store.find(text) for text in (a, b)]
    return [(f"{refs[0]} and {refs[1]}", *(store.manifest(ref)["identity"] for ref in refs))]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


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
    from sft_core.recipe import load_recipe
    from sft_core.store import Store
    from steps.check import check_text, checked

    loaded = load_recipe(recipe, overrides=overrides, limit=limit)
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

    from sft_core.store import CorruptOutput

    store = _existing_store(root)
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
@click.option("--json", "as_json", is_flag=True, help="A JSON list of {task, metric, n, base, tuned, stderr}.")
def scores(as_json: bool) -> None:
    """The table of the last run that finished.

    \b
    Example: sft scores --json
    """
    from steps.report import summary
    from steps.runs import last_finished

    data = last_finished()
    click.echo(json.dumps(data["scores"], indent=1) if as_json else summary(**data).strip())


@main.command()
def resume() -> None:
    """Continue the last attempt, a resumed one that failed included: finished steps are not run again.

    \b
    Example: sft resume
    """
    from steps.runs import failed_tasks, last_attempt

    run = last_attempt()
    failed = failed_tasks(run)
    # To Metaflow a failed evaluation is done. From the step on, those that are scored are hits.
    step = ["evaluate"] if failed else []
    click.echo(f"resuming {run}" + (f", evaluating {', '.join(failed)} again" if failed else ""))
    sys.exit(subprocess.call([sys.executable, str(FLOW), "resume", *step, "--origin-run-id", run]))


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


@main.group()
def store() -> None:
    """What is in the store, and freeing what is not used."""


@store.command("list")
@click.option("--store", "root", default="store", show_default=True, help="The store: a folder or a URL.")
def list_outputs(root: str) -> None:
    """Every output with its size and when it was last used.

    \b
    Example: sft store list
    """
    from sft_core.report.tables import text_table
    from sft_core.store import part_name

    opened = _existing_store(root)
    rows = []
    for ref in opened.refs():
        part = part_name(opened.manifest(ref)["identity"]["part"])
        rows.append((str(ref), part, _size(opened.num_bytes(ref)), _ago(opened.last_used(ref))))
    total = sum(opened.num_bytes(ref) for ref in opened.refs())
    click.echo(text_table(("output", "name", "size", "last used"), rows) if rows else f"{root}: no outputs")
    click.echo(f"\n{len(rows)} outputs, {_size(total)}")


@store.command()
@click.argument("refs", nargs=-1)
@click.option("--store", "root", default="store", show_default=True, help="The store: a folder or a URL.")
@click.option("--unused-for", "days", type=float, default=30.0, show_default=True, help="Days without use.")
@click.option("--delete", is_flag=True, help="Remove them; without it, only show what would go.")
def gc(refs: tuple[str, ...], root: str, days: float, delete: bool) -> None:
    """Remove outputs that no run has used for a while, or those named, and what killed builds left.

    \b
    Examples: sft store gc --unused-for 14
              sft store gc tokens/3f2a --delete
    """
    import shutil

    opened = _existing_store(root)
    old = time.time() - days * 86400
    chosen = [opened.find(ref) for ref in refs] or [ref for ref in opened.refs() if opened.last_used(ref) < old]
    left = [] if refs else [path for path in opened.abandoned() if path.stat().st_mtime < old]
    sizes = {str(ref): opened.num_bytes(ref) for ref in chosen}
    sizes |= {f"{path.name} (unfinished)": _folder_bytes(path) for path in left}
    there = [] if refs or not opened.remote else [one for one in opened.remote.leftovers() if one.last_used < old]
    sizes |= {f"{one.path} (unfinished)": one.num_bytes for one in there}
    for name, size in sizes.items():
        click.echo(f"{'removed' if delete else 'would remove'} {name}  {_size(size)}")
    if delete:
        for ref in chosen:
            opened.remove(ref)
        for path in left:
            shutil.rmtree(path)
        for one in there:
            assert opened.remote is not None
            opened.remote.remove_leftover(one)
    click.echo(f"{len(sizes)} outputs, {_size(sum(sizes.values()))}" + ("" if delete else "; add --delete to remove"))


def _existing_store(root: str) -> Store:
    from sft_core.store import Store, is_url

    if not is_url(root) and not Path(root).expanduser().is_dir():
        raise FileNotFoundError(f"--store: found {root!r}; no such folder (looked in {Path.cwd()})")
    return Store(root)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


if __name__ == "__main__":
    main()
