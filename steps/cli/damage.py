"""Damaged outputs of a store, and the outputs that were made from them."""

from __future__ import annotations

import collections
from collections.abc import Collection, Sequence
from typing import NamedTuple

from tqdm import tqdm

from sft_core.store.manifest import CorruptOutput
from sft_core.store.ref import Ref
from sft_core.store.store import Store


class Damage(NamedTuple):
    """faults: what is wrong with each damaged output. derived: other outputs that were made from damaged ones, directly
    or not, with those. whole: the verified outputs without damage.
    """

    faults: dict[Ref, CorruptOutput]
    derived: dict[Ref, list[Ref]]
    whole: list[Ref]


def find_damage(store: Store, refs: Sequence[Ref]) -> Damage:
    """Verifies the outputs, behind the URL where the store has one, and looks in the whole store for what they made."""
    faults: dict[Ref, CorruptOutput] = {}
    for ref in tqdm(refs, unit=" outputs", disable=None):
        try:
            store.verify(ref, remote=True)
        except CorruptOutput as fault:
            faults[ref] = fault
    derived = _made_from(store, faults.keys()) if faults else {}
    return Damage(faults, derived, [ref for ref in refs if ref not in faults])


def _made_from(store: Store, damaged: Collection[Ref]) -> dict[Ref, list[Ref]]:
    """{output: the damaged ones behind it}."""
    readers: dict[Ref, list[Ref]] = collections.defaultdict(list)
    for ref in store.refs():
        try:
            inputs = store.manifest(ref)["inputs"]
        except CorruptOutput:
            continue  # nobody knows what it was made from
        for address in inputs.values():
            readers[Ref(*address)].append(ref)
    derived: dict[Ref, list[Ref]] = {}
    for start in damaged:
        waiting = collections.deque(readers[start])
        reached: set[Ref] = set()
        while waiting:
            ref = waiting.popleft()
            if ref not in reached and ref not in damaged:
                reached.add(ref)
                derived.setdefault(ref, []).append(start)
                waiting += readers[ref]
    return derived
