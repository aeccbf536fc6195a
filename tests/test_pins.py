"""Pins: what a name points to now. They move with contents, never with where a folder stands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins import PinnedRecipe, Unresolved, is_local, pin, resolve_commit, template_path
from sft_core.recipe import override, parse_recipe
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def pinned(data: dict[str, Any], *overrides: str, allow_unresolved: bool = False) -> PinnedRecipe:
    return pin(parse_recipe(override(data, overrides)), allow_unresolved=allow_unresolved)


@pytest.fixture
def world(small_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe whose source, tokenizer, model and template are files of the test's own."""
    small_recipe["limit"] = None
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"messages": []}\n')
    shutil.copytree(ROOT / "configs" / "quickstart" / "tokenizer", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    small_recipe["model"] = {"model_name_or_path": str(tmp_path / "model")}
    small_recipe["chat_template"] = {"template": str(tmp_path / "mine.jinja")}
    small_recipe["dataset_mixture"]["datasets"] = [{"path": str(tmp_path / "data" / "a.jsonl")}]
    return small_recipe


@pytest.mark.parametrize(
    ("file", "moved"),
    [
        ("data/a.jsonl", {"sources"}),
        ("model/model.safetensors", {"model"}),
        ("model/config.json", {"model"}),
        ("model/tokenizer.json", {"tokenizer"}),
        ("model/tokenizer_config.json", {"tokenizer"}),
        ("mine.jinja", {"template"}),
        ("model/README.md", set()),
    ],
)
def test_pin_changed_content_moves_its_own_pin(world, tmp_path: Path, file: str, moved: set[str]):
    before = pinned(world).pins
    assert all(before.values())
    with (tmp_path / file).open("a") as opened:
        opened.write(" ")
    after = pinned(world).pins
    assert {key for key in before if before[key] != after[key]} == moved


def test_pin_moved_folders_keep_every_pin_and_identity(world, tmp_path: Path):
    before = pinned(world)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("data", "model", "mine.jinja"):
        (tmp_path / name).rename(elsewhere / name)
    after = pinned(json.loads(json.dumps(world).replace(str(tmp_path), str(elsewhere))))
    assert before.recipe != after.recipe
    assert before.pins == after.pins
    for identity in ("tokenizer_identity", "model_identity", "template_identity"):
        assert getattr(before, identity) == getattr(after, identity)
        assert str(elsewhere) not in json.dumps(getattr(after, identity))
    assert after.model_loader["path"] == after.tokenizer_loader["path"] == str(elsewhere / "model")
    assert after.model_loader["revision"] is None


@pytest.mark.parametrize(
    ("override", "moved"),
    [
        ("model.add_special_tokens=[<x>]", "tokenizer_identity"),
        ("model.eos_token=<x>", "tokenizer_identity"),
        ("model.dtype=bfloat16", "model_identity"),
        ("model.attn_implementation=eager", "model_identity"),
        ("chat_template.kwargs={header: false}", "template_identity"),
        ("chat_template.date=2024-01-01", "template_identity"),
    ],
)
def test_identity_holds_what_changes_the_thing(world, override: str, moved: str):
    before, after = pinned(world), pinned(world, override)
    identities = ("tokenizer_identity", "model_identity", "template_identity")
    assert [name for name in identities if getattr(before, name) != getattr(after, name)] == [moved]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("dataset_mixture.datasets.0.path=none.jsonl",), r"none\.jsonl: no such file \(looked in /"),
        (("model.model_name_or_path=./none",), r"model\.model_name_or_path: found '\./none'; no such folder \(looked"),
        (("model.tokenizer_name_or_path=./none",), r"model\.tokenizer_name_or_path: found '\./none'; no such folder"),
        (("chat_template.template=thinkin",), r"chat_template\.template: found 'thinkin'; it is no file.*: thinking"),
        (("chat_template.template=a/none.jinja",), r"chat_template\.template: found 'a/none\.jinja'; it is no file"),
    ],
)
def test_pin_what_is_missing_is_named_with_its_key(world, overrides: tuple[str, ...], expected: str):
    with pytest.raises(FileNotFoundError, match=expected):
        pinned(world, *overrides)


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ("model.safetensors", r"model holds no \.safetensors weights, the only kind we load \(.*pytorch_model\.bin"),
        ("config.json", r"model holds no config\.json"),
        ("tokenizer*", r"model holds no tokenizer files \(tokenizer\.json\)"),
    ],
)
def test_pin_a_folder_that_is_no_model_says_what_it_lacks(world, tmp_path: Path, removed: str, expected: str):
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"weights")
    files = list((tmp_path / "model").glob(removed))
    assert files
    for path in files:
        path.unlink()
    with pytest.raises(FileNotFoundError, match=expected):
        pinned(world)


def test_pin_an_index_without_its_shards_is_no_model(world, tmp_path: Path):
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model.safetensors.index.json")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors weights"):
        pinned(world)


def test_pin_home_folder_is_found_and_loaded_from_there(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = pinned(world, "model.model_name_or_path=~/model")
    assert found.pins == pinned(world).pins
    assert found.model_loader["path"] == found.tokenizer_loader["path"] == str(tmp_path / "model")


def test_template_names_paths_and_the_tokenizers_own(world):
    assert template_path(parse_recipe(override(world, ("chat_template.template=thinking",)))).name == "thinking.jinja"
    assert pinned(world).template_text == "{{ messages }}"
    own = pinned(world, "chat_template.template=null")
    assert own.pins["template"] is None and own.template_text is None


@pytest.mark.parametrize(
    ("name", "local"),
    [("org/model", False), ("gpt2", False), ("./x", True), ("/x", True), ("~/x", True), ("a/b/c", True)],
)
def test_is_local_is_told_by_the_name_where_nothing_exists(name: str, local: bool, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_local(name) is local
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert is_local("org/model")


def test_resolve_commit_full_commit_needs_no_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import of it fails
    assert resolve_commit("dataset", "org/none", COMMIT) == COMMIT
    with pytest.raises(ImportError):
        resolve_commit("dataset", "org/none", "main")


def test_pin_hub_names_at_a_hub_that_answers_then_goes(small_recipe, tmp_path: Path):
    small_recipe["dataset_mixture"]["datasets"] = [{"id": "org/chat"}]
    small_recipe["model"] = {"model_name_or_path": "org/tiny", "model_revision": "v1"}
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.test_pins import COMMIT, Unresolved, pinned, resolve_commit

def message(call):
    try:
        return call()
    except Unresolved as error:
        return str(error)

data = json.loads(sys.argv[1])
found = pinned(data)
result = {{"pins": found.pins, "loader": found.model_loader["revision"]}}
result["names"] = [
    message(lambda: resolve_commit("dataset", "org/none", "main")),
    message(lambda: resolve_commit("model", "org/none", "main")),
    message(lambda: resolve_commit("dataset", "org/chat", "none")),
    message(lambda: resolve_commit("dataset", "org/gated", "main")),
]
print(json.dumps(result), flush=True)
input()
result = {{"gone": message(lambda: pinned(data))}}
result["allowed"] = pinned(data, allow_unresolved=True).pins
commits = (f"dataset_mixture.datasets.0.revision={{COMMIT}}", f"model.model_revision={{COMMIT}}")
result["commits"] = pinned(data, *commits).pins
print(json.dumps(result))
"""
    with HubServer() as server:
        old = server.publish("datasets", "org/chat", {"README.md": b"old"})
        chat = server.publish("datasets", "org/chat", {"README.md": b"new"})
        tiny = server.publish("models", "org/tiny", {"config.json": b"{}"}, revision="v1")
        server.publish("datasets", "org/gated", {"README.md": b"card"})
        server.restrict("datasets", "org/gated", token="sesame", access="private")
        environment = server.environment(tmp_path) | {"HF_HUB_ETAG_TIMEOUT": "2"}
        client = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(small_recipe)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = client.stdout.readline()
    output, errors = client.communicate("\n", timeout=60)
    assert client.returncode == 0, errors
    answered, gone = json.loads(line), json.loads(output)

    assert answered["pins"]["sources"] == {"chat": chat} and chat != old
    assert answered["pins"]["model"] == answered["pins"]["tokenizer"] == answered["loader"] == tiny
    unknown, unknown_model, no_revision, private = answered["names"]
    assert "dataset org/none: the hub knows no such dataset" in unknown and "use path" in unknown
    assert "model org/none: the hub knows no such model" in unknown_model and "local folder" in unknown_model
    assert no_revision == "dataset org/chat: has no revision 'none'"
    assert "HF_TOKEN" in private

    assert "the hub cannot be reached to resolve revision" in gone["gone"] and "write a full commit" in gone["gone"]
    assert gone["allowed"]["sources"] == {"chat": None}
    assert gone["allowed"]["model"] is gone["allowed"]["tokenizer"] is None
    assert gone["commits"]["sources"] == {"chat": COMMIT}
    assert gone["commits"]["model"] == gone["commits"]["tokenizer"] == COMMIT


def test_unresolved_is_an_error_of_the_user():
    assert issubclass(Unresolved, ValueError)
