"""One flipped bit in a stored file, then the reader of that file: each stage that has the output as its input."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaign.pipeline import files_of

REFUSED, UNREAD, USED, CRASHED, UNSEEN = "refused", "not read", "used", "crashed", "not found by verify"


class Flip(NamedTuple):
    """reader: the stage that was built again. outcome: one of the above; UNREAD means the same bits as ever."""

    file: str
    bit: int
    reader: str
    outcome: str
    message: str


class Reader(NamedTuple):
    stage: Any
    part: dict[str, Any]
    ref: Any
    inputs: list[Any]  # the refs of the outputs whose files it reads


def flips(seed: int, number: int, data: dict[str, Any], folder: Path) -> Iterator[Flip]:
    """data: the recipe whose outputs are all in its store; the store is left as it is."""
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe

    clean = Path(data["runtime"]["store"])
    pinned = pin(parse_recipe(data))
    readers = readers_of(clean, pinned)
    expected, rng = files_of(clean), random.Random(seed)
    cases = [
        (reader, path.relative_to(clean).as_posix())
        for reader in readers
        for ref in reader.inputs
        for path in sorted((clean / ref.stage / ref.key).rglob("*"))
        if path.is_file() and path.stat().st_size
    ]
    by_pair: dict[tuple[str, str], list[tuple[Reader, str]]] = {}
    for reader, name in cases:  # each kind of file as often as another, however many files there are of it
        stage, _, file = name.split("/", 2)
        kind = f"{stage}/{''.join(char for char in file if not char.isdigit())}"
        by_pair.setdefault((reader.stage.name, kind), []).append((reader, name))
    pairs = sorted(by_pair)
    for count in range(number):
        reader, name = rng.choice(by_pair[pairs[count % len(pairs)]])
        yield _flip(rng, reader, name, clean, folder / "store", pinned, expected)


def readers_of(store: Path, pinned: Any) -> list[Reader]:
    """Every output of the store that was made from files of another."""
    from sft_core.store.lookups import Lookups
    from sft_core.store.store import Store
    from steps.release import RELEASED

    opened, lookups, readers = Store(store), Lookups(), {}

    def visit(stage: Any, part: dict[str, Any]) -> None:
        located = opened.locate(stage, pinned, part, lookups)
        assert located.ref is not None and located.status == "hit", f"{stage.name} is not in {store}"
        if located.ref in readers:
            return
        needed = [opened.locate(*reversed_(need), lookups).ref for need in _needs(stage, pinned, part)]
        readers[located.ref] = Reader(stage, part, located.ref, needed)
        for need, need_part in stage.inputs(pinned, part).values():
            visit(need, need_part)

    def reversed_(need: tuple[Any, dict[str, Any]]) -> tuple[Any, Any, dict[str, Any]]:
        return need[0], pinned, need[1]

    visit(RELEASED, {})
    return [reader for reader in readers.values() if reader.inputs]


def _needs(stage: Any, pinned: Any, part: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    return list(stage.needs(pinned, part).values())


def _flip(
    rng: random.Random, reader: Reader, name: str, clean: Path, store: Path, pinned: Any, expected: dict[str, str]
) -> Flip:
    from sft_core.store.manifest import CorruptOutput
    from sft_core.store.ref import Ref
    from sft_core.store.store import Store

    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(clean, store, copy_function=os.link, ignore=shutil.ignore_patterns(".*"))
    damaged, ref = store / name, Ref(*name.split("/")[:2])
    data = bytearray(damaged.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    damaged.unlink()  # it is a link to the clean store's file
    damaged.write_bytes(data)
    output = f"{reader.ref.stage}/{reader.ref.key}"
    shutil.rmtree(store / output)

    def flip(outcome: str, message: object = "") -> Flip:
        return Flip(name, bit, reader.stage.name, outcome, str(message))

    opened = Store(store)
    try:
        opened.verify(ref)
        return flip(UNSEEN)
    except CorruptOutput:
        pass
    try:
        made = opened.ensure(reader.stage, pinned, **reader.part)
    except CorruptOutput as error:
        return flip(REFUSED if str(ref) in str(error) else CRASHED, error)
    except Exception as error:
        return flip(CRASHED, repr(error))
    of_output = {file: digest for file, digest in expected.items() if file.startswith(f"{output}/")}
    is_same = (
        made == reader.ref
        and {file: digest for file, digest in files_of(store).items() if file.startswith(f"{output}/")} == of_output
    )
    return flip(UNREAD if is_same else USED)


def as_row(found: list[Flip]) -> tuple[str, str, str]:
    outcomes, pairs = (
        Counter(flip.outcome for flip in found),
        {(flip.reader, flip.file.split("/")[0]) for flip in found},
    )
    return (
        f"{len(found)} flipped bits, over {len(pairs)} pairs of a stage and a stage that reads it",
        "each is refused with the output's name, or in a file that the stage does not read; none is used",
        "; ".join(f"{outcomes[kind]} {kind}" for kind in (REFUSED, UNREAD, USED, CRASHED, UNSEEN)),
    )


def is_kept(found: list[Flip]) -> bool:
    return all(flip.outcome in (REFUSED, UNREAD) for flip in found)
