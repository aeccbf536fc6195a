"""`sft store`: lists the outputs of a store, and removes unused ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from humanize import naturalsize, naturaltime

from steps.cli.say import say

if TYPE_CHECKING:
    from sft_core.store.store import Store


def existing_store(root: str) -> Store:
    from sft_core.store.store import Store, is_url

    if not is_url(root) and not Path(root).expanduser().is_dir():
        raise FileNotFoundError(f"--store: found {root!r}; no such folder (looked in {Path.cwd()})")
    return Store(root)


@click.group()
def store() -> None:
    """List the outputs of a store, and remove unused ones."""


@store.command("list")
@click.option("--store", "root", default="store", show_default=True, help="The store: a folder or a URL.")
def list_outputs(root: str) -> None:
    """List every output with its size and its last use.

    \b
    Example: sft store list
    """
    from sft_core.report.tables import text_table
    from sft_core.store.stage import part_name

    opened = existing_store(root)
    rows = []
    for ref in opened.refs():
        part = part_name(opened.manifest(ref)["identity"]["part"])
        unused_s = max(0.0, time.time() - opened.last_used(ref))  # the clock of a server may be ahead of this one
        size = naturalsize(opened.num_bytes(ref), binary=True)
        rows.append((str(ref), part, size, naturaltime(unused_s, months=False)))
    total = naturalsize(sum(opened.num_bytes(ref) for ref in opened.refs()), binary=True)
    say(text_table(("output", "name", "size", "last used"), rows) if rows else f"{root}: no outputs")
    say(f"\n{len(rows)} outputs, {total}")


@store.command()
@click.argument("refs", nargs=-1)
@click.option("--store", "root", default="store", show_default=True, help="The store: a folder or a URL.")
@click.option("--unused-for", "days", type=float, default=30.0, show_default=True, help="Days without use.")
@click.option("--damaged", is_flag=True, help="Damaged outputs, and all that were made from them, used or not.")
@click.option("--delete", is_flag=True, help="Remove them; without it, only show what would go.")
def gc(refs: tuple[str, ...], root: str, days: float, damaged: bool, delete: bool) -> None:
    """Remove outputs that no run has used for a while, or those named, and leftovers of killed builds.

    \b
    Examples: sft store gc --unused-for 14
              sft store gc tokens/3f2a --delete
              sft store gc --damaged
    """
    import shutil

    from steps.cli.damage import find_damage

    opened = existing_store(root)
    if damaged and refs:
        raise ValueError(f"--damaged: found {refs[0]!r} beside it; it looks at every output, name none")
    old = time.time() - days * 86400
    if damaged:
        damage = find_damage(opened, opened.refs())
        chosen = [
            *damage.derived,
            *damage.faults,
        ]  # what was made goes first: a killed removal then leaves the damaged one
    else:
        chosen = [opened.find(ref) for ref in refs] or [ref for ref in opened.refs() if opened.last_used(ref) < old]
    by_age = not refs and not damaged
    unfinished = [path for path in opened.abandoned() if path.stat().st_mtime < old] if by_age else []
    sizes = {str(ref): opened.num_bytes(ref) for ref in chosen}
    sizes |= {f"{path.name} (unfinished)": _folder_bytes(path) for path in unfinished}
    leftovers = opened.remote.leftovers() if by_age and opened.remote else []
    leftovers = [leftover for leftover in leftovers if leftover.last_used < old]
    sizes |= {f"{leftover.path} (unfinished)": leftover.num_bytes for leftover in leftovers}
    for name, size in sizes.items():
        say(f"{'removed' if delete else 'would remove'} {name}  {naturalsize(size, binary=True)}")
    if delete:
        for ref in chosen:
            opened.remove(ref)
        for path in unfinished:
            shutil.rmtree(path)
        for leftover in leftovers:
            assert opened.remote is not None
            opened.remote.remove_leftover(leftover)
    total = naturalsize(sum(sizes.values()), binary=True)
    say(f"{len(sizes)} outputs, {total}" + ("" if delete else "; add --delete to remove"))


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
