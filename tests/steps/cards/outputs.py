"""Outputs that a card reads, without a run that makes them."""

from __future__ import annotations

import json
from typing import Any

from sft_core.store.manifest import KEY_HEX, MANIFEST, Identity, make_manifest, sha256_of
from sft_core.store.ref import Ref
from sft_core.store.store import Store


def saved(
    store: Store, stage: str, part: dict[str, Any], counts: dict[str, Any], section: dict[str, Any] | None = None
) -> Ref:
    """An output of no files in the store, with a manifest as the store writes them."""
    identity: Identity = {"stage": stage, "part": part, "section": section or {}, "inputs": {}, "code": 1}
    ref = Ref(stage, sha256_of(identity)[:KEY_HEX])
    folder = store.root / stage / ref.key
    folder.mkdir(parents=True)
    manifest = make_manifest(ref, identity, {}, counts, {}, 1.0, None)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return ref
