"""Every output that an output was made from, back to the sources, by the manifests in the store."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from sft_core.data.sources.registry import origin_of
from sft_core.parquet import read_table
from sft_core.store.manifest import Manifest
from sft_core.store.provenance import source_label
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cli.store import existing_store
from steps.runs.recorded import is_run, recorded

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

DIGEST_SHOWN = 12  # hex digits
NAMES_SHOWN = 5  # files of a source
GONE = "no longer in the store"
# The counts that a line shows, by stage.
_COUNTS = {
    "conversations": ("conversations",),
    "rendered": ("rows",),
    "tokens": ("rows", "tokens", "trained_tokens"),
    "mixture": ("rows", "tokens", "trained_tokens"),
    "packed": ("packs", "tokens", "fill"),
    "trained": ("steps", "last_loss"),
    "pushed": ("url",),
}


@dataclasses.dataclass(frozen=True)
class Lineage:
    """manifests: those of the root and of all that it was made from, nearest first; None for a removed output."""

    root: Ref
    manifests: dict[Ref, Manifest | None]

    def inputs(self, ref: Ref) -> dict[str, Ref]:
        manifest = self.manifests[ref]
        return {} if manifest is None else {name: Ref(*address) for name, address in manifest["inputs"].items()}

    def behind(self, ref: Ref) -> set[Ref]:
        """All outputs that the output was made from, directly or not."""
        refs: set[Ref] = set()
        waiting = [ref]
        while waiting:
            new = set(self.inputs(waiting.pop()).values()) - refs
            refs |= new
            waiting += new
        return refs

    def nearest(self, ref: Ref) -> list[Ref]:
        """The inputs that are not behind another input, so that a tree shows each output where it was used first."""
        inputs = set(self.inputs(ref).values())
        further = {behind for other in inputs for behind in self.behind(other)}
        # Longest history first: the tuned model's scores lead to everything that the base's scores lead to.
        return sorted(inputs - further, key=lambda near: (-len(self.behind(near)), self.name(near), near))

    def name(self, ref: Ref) -> str:
        """The output's part in words: `tuned copy`, `round 0`."""
        manifest = self.manifests[ref]
        part = {} if manifest is None else manifest["identity"]["part"]
        return " ".join(f"round {value}" if key == "round" else str(value) for key, value in part.items())


def find(name: str, root: str) -> tuple[Store, Ref]:
    """The output that a name means: stage/key, or a run, which means its report (or its furthest output so far).

    root: the store of an output. Raises ValueError for any other name.
    """
    if not is_run(name):
        store = existing_store(root)
        return store, store.find(name)
    run = recorded(name)
    for output in ("scored", "delivered", "trained", "packed", "mixture"):
        if output in run.outputs:
            return Store(run.recipe.runtime.store), Ref(*run.outputs[output].split("/"))
    raise ValueError(f"run {run.id} has made no mixture yet, and sources have no history; wait, or name an output")


def trace(store: Store, root: Ref) -> Lineage:
    """Follows the inputs in the manifests from the root."""
    manifests: dict[Ref, Manifest | None] = {}
    waiting = collections.deque([root])
    while waiting:
        ref = waiting.popleft()
        if ref not in manifests:
            manifests[ref] = store.manifest(ref) if store.has(ref) else None
            waiting += [Ref(*address) for address in (manifests[ref] or {"inputs": {}})["inputs"].values()]
    return Lineage(root, manifests)


def as_json(store: Store, lineage: Lineage) -> dict[str, object]:
    """{root, outputs: {stage/key: facts of the output}, removed: [stage/key]}."""
    outputs = {
        str(ref): {
            "stage": ref.stage,
            "part": manifest["identity"]["part"],
            "content": manifest["content"],
            "created": manifest["created"],
            "seconds": manifest["seconds"],
            "source_code": manifest.get("source_code"),
            "inputs": {name: str(needed) for name, needed in lineage.inputs(ref).items()},
            **_origins(store, ref, manifest),
        }
        for ref, manifest in lineage.manifests.items()
        if manifest is not None
    }
    removed = [str(ref) for ref, manifest in lineage.manifests.items() if manifest is None]
    return {"root": str(lineage.root), "outputs": outputs, "removed": removed}


def as_tree(store: Store, lineage: Lineage) -> Tree:
    from rich.tree import Tree

    from steps.console import styled

    tree = Tree(_line(lineage, lineage.root), guide_style="dim", highlight=False)
    shown = {lineage.root}

    def grow(branch: Tree, ref: Ref) -> None:
        manifest = lineage.manifests[ref]
        if manifest is None:
            return
        for kind, origin in _origins(store, ref, manifest).items():
            branch.add(f"{kind.replace('_', ' ')}: {_origin_text(origin)}")
        for near in lineage.nearest(ref):
            if near in shown:
                branch.add(styled((str(near), "cyan"), " ", ("(above)", "dim")))
            else:
                shown.add(near)
                grow(branch.add(_line(lineage, near)), near)

    grow(tree, lineage.root)
    return tree


def _line(lineage: Lineage, ref: Ref) -> Text:
    from steps.console import styled

    manifest, address = lineage.manifests[ref], (str(ref), "cyan")
    if manifest is None:
        return styled(address, " ", (GONE, "red"))
    by = source_label(manifest["source_code"]) if manifest.get("source_code") else None
    created = f"{manifest['created'].replace('T', ' ').rstrip('Z')}" + (f" by {by}" if by else "")
    counts, content = _counts_text(ref, manifest["counts"]), f"content {manifest['content'][:DIGEST_SHOWN]}"
    return styled(address, *(f"  {text}" for text in (lineage.name(ref), counts, content, created) if text))


def _counts_text(ref: Ref, counts: Mapping[str, Any]) -> str:
    if ref.stage == "evaluated":
        return ", ".join(f"{score['metric']} {score['value']:.4f}" for score in counts["scores"])
    values = [(name, counts[name]) for name in _COUNTS.get(ref.stage, ()) if counts.get(name) is not None]
    return ", ".join(
        f"{name.replace('_', ' ')} {value:,}"
        if isinstance(value, int)
        else f"{name.replace('_', ' ')} {value:.4f}"
        if isinstance(value, float)
        else f"{name} {value}"
        for name, value in values
    )


def _origins(store: Store, ref: Ref, manifest: Manifest) -> dict[str, Mapping[str, object]]:
    """The inputs of an output that are no outputs: files or a hub revision, a start model, a template."""
    section = manifest["identity"]["section"]
    if ref.stage == "conversations":
        return {"source": origin_of(section, lambda: _files(store, ref))}
    if ref.stage == "rendered":
        template, tokenizer = section["template"], section["tokenizer"]
        pin = template["pin"] or f"of the tokenizer {tokenizer['pin']}"
        return {"chat_template": {"digest": pin, "kwargs": template["kwargs"], "date": template["date"]}}
    if ref.stage == "trained" and manifest["identity"]["part"].get("round") == 0:
        model = section["job"]["model"]
        seed = section["job"]["training"]["seed"]
        random = {"random": (model["config"] or {}).get("model_type"), "seed": seed}
        return {"start_model": random if model["pin"] is None else {"digest_or_revision": model["pin"]}}
    return {}


def _files(store: Store, ref: Ref) -> list[str]:
    """The names of a source's files, by the places that its rows name."""
    with store.open(ref, "conversations.parquet") as file:
        where = read_table(file, ["where"])["where"]
    return sorted(pc.unique(pc.replace_substring_regex(where, r":[^:]*$", "")).to_pylist())


def _origin_text(origin: Mapping[str, object]) -> str:
    shown = []
    for name, value in origin.items():
        if isinstance(value, list):
            more = f" and {len(value) - NAMES_SHOWN} more" if len(value) > NAMES_SHOWN else ""
            shown.append(", ".join(value[:NAMES_SHOWN]) + more)
        elif value not in (None, {}):
            text = str(value)
            is_digest = name in ("sha256", "digest") and isinstance(value, str) and " " not in text
            shown.append(f"{name.replace('_', ' ')} {text[:DIGEST_SHOWN] if is_digest else text}")
    return "  ".join(shown)
