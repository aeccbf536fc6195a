"""`sft lineage`: from any output back to its source files, and the way of a row, as the data itself has it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sft_core.data.shards.token_shards import TokenShards, read_index
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from tests.conftest import QUICKSTART

SOURCES = ("copy_no_think", "checksum_think")


def only(store: Store, stage: str, source: str | None = None) -> Ref:
    found = [ref for ref in store.refs() if ref.stage == stage]
    if source is not None:
        found = [ref for ref in found if store.manifest(ref)["identity"]["part"]["source"] == source]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def store(built_recipe: dict[str, Any]) -> Store:
    return Store(built_recipe["runtime"]["store"])


def test_lineage_json_leads_from_the_packs_to_the_files(sft, store: Store):
    packed = only(store, "packed")
    found = json.loads(sft("lineage", packed, "--json", "--store", store.root).stdout)
    assert found["root"] == str(packed) and found["removed"] == []
    assert set(found["outputs"]) == {str(ref) for ref in store.refs()}
    way = str(packed)
    for stage in ("mixture", "tokens", "rendered", "conversations"):
        way = next(one for one in found["outputs"][way]["inputs"].values() if one.startswith(f"{stage}/"))
        manifest = store.manifest(Ref(*way.split("/")))
        output = found["outputs"][way]
        for key in ("content", "created", "seconds", "source_code"):
            assert output[key] == manifest[key]
    name = output["part"]["source"]
    assert output["source"] == {"files": [f"{name}.jsonl"], "sha256": manifest["identity"]["section"]["pin"]}


def test_lineage_tree_shows_each_output_once_under_what_was_made_from_it(sft, store: Store):
    packed = only(store, "packed")
    lines = sft("lineage", packed, "--store", store.root).stdout.splitlines()
    for ref in store.refs():
        assert sum(str(ref) in line for line in lines) == 1
    depths = [len(line) - len(line.lstrip("│├└─ ")) for line in lines]
    assert lines[0].startswith(str(packed)) and str(only(store, "mixture")) in lines[1]
    assert depths[:2] == [0, 4] and [line.strip("│├└─ ").split("/")[0] for line in lines].count("tokens") == 2
    assert sum(".jsonl  sha256 " in line for line in lines) == 2
    tokens = next(line for line in lines if "tokens/" in line)
    assert "rows 60" in tokens and "content " in tokens


def test_lineage_tells_what_was_removed(sft, store: Store):
    rendered = only(store, "rendered", "copy_no_think")
    store.remove(rendered)
    arguments = ("lineage", only(store, "packed"), "--store", store.root)
    assert f"{rendered} no longer in the store" in sft(*arguments).stdout
    assert json.loads(sft(*arguments, "--json").stdout)["removed"] == [str(rendered)]


def test_lineage_of_a_hub_source_names_its_revision(store: Store):
    from steps.cli.lineage import _origins

    conversations = only(store, "conversations", "copy_no_think")
    manifest = json.loads(json.dumps(store.manifest(conversations)))
    manifest["identity"]["section"] |= {"id": "org/data", "config": "en", "split": "train", "pin": "a" * 40}
    expected = {"hub": "org/data", "config": "en", "split": "train", "revision": "a" * 40}
    assert _origins(store, conversations, manifest) == {"source": expected}


@pytest.mark.parametrize("source", SOURCES)
def test_lineage_of_a_trained_row_is_where_the_data_has_it(sft, store: Store, source: str):
    tokens, packed = only(store, "tokens", source), only(store, "packed")
    plan = pq.read_table(store.path(packed) / "packs.parquet").to_pylist()
    number = SOURCES.index(source)
    entry = next(one for one in plan if one["source"] == number and one["row"] > 5)
    index = read_index(store.path(tokens)).to_pylist()[entry["row"]]
    (found,) = json.loads(sft("lineage", packed, "--row", index["row_id"], "--json", "--store", store.root).stdout)
    assert (found["source"], found["split"], found["prompt_hash"]) == (source, "train", index["prompt_hash"])
    (where,) = found["where"]
    name, line = where.split(":")
    raw = json.loads((QUICKSTART / name).read_text().splitlines()[int(line) - 1])
    rendered = store.path(only(store, "rendered", source)) / "shard-00000" / "rendered.parquet"
    text = pq.read_table(rendered, partitioning=None).to_pylist()[entry["row"]]["text"]
    assert raw["messages"][0]["content"] in text
    assert found["texts"] == [{"sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)}]
    (row,) = found["rows"]
    ids = TokenShards(store.path(tokens))[row["row"]].input_ids
    assert row["row"] == entry["row"] and row["num_tokens"] == len(ids) == entry["num_tokens"]
    (packs,) = found["packs"]
    assert packs["packs"] == [entry["pack"]] and packs["num_tokens"] == [entry["num_tokens"]]
    shown = sft("lineage", packed, "--row", index["row_id"], "--store", store.root).stdout
    assert f"packs: {entry['pack']}  ({packed})" in shown and where in shown


def test_lineage_of_a_report_row_is_in_no_pack(sft, store: Store):
    packed = only(store, "packed")
    tokens = only(store, "tokens", "copy_no_think")
    hashes = np.array(read_index(store.path(tokens))["prompt_hash"].to_pylist(), dtype=np.float64) / 2.0**64
    row = int(np.flatnonzero(hashes < 0.15)[0])
    row_id = read_index(store.path(tokens))["row_id"][row].as_py()
    (found,) = json.loads(sft("lineage", packed, "--row", row_id, "--json", "--store", store.root).stdout)
    assert found["split"] == "report" and found["packs"][0]["packs"] == []
    shown = sft("lineage", packed, "--row", row_id, "--store", store.root).stdout
    assert "none, it is not trained on" in shown


def test_lineage_mistakes_are_told(sft, store: Store, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed = only(store, "packed")
    told = sft("lineage", packed, "--row", "zz", "--store", store.root, code=1).stderr
    assert "--row: found 'zz'" in told and "copy_no_think" in told and "checksum_think" in told
    assert "no output of the store" in sft("lineage", "packed/zz", "--store", store.root, code=1).stderr
    assert "no run is recorded here" in sft("lineage", "latest", code=1).stderr
    assert "no such folder" in sft("lineage", packed, "--store", tmp_path / "none", code=1).stderr
