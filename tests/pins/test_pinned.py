"""Pins: what a name points to now. They move with contents, never with where a folder stands."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sft_core.local_files import is_local
from sft_core.pins.pinned import PinnedRecipe, Unresolved, pin, resolve, template_path
from sft_core.recipe.parse import override, parse_recipe
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]
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
    assert resolve("dataset", "org/none", COMMIT) == (COMMIT, None)
    with pytest.raises(ImportError):
        resolve("dataset", "org/none", "main")


@pytest.mark.slow
def test_pin_hub_names_at_a_hub_that_answers_then_goes(small_recipe, tmp_path: Path):
    small_recipe["dataset_mixture"]["datasets"] = [{"id": "org/chat"}]
    small_recipe["model"] = {"model_name_or_path": "org/tiny", "model_revision": "v1"}
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.pins.test_pinned import COMMIT, Unresolved, pinned, resolve

def message(call):
    try:
        return call()
    except Unresolved as error:
        return str(error)

data = json.loads(sys.argv[1])
found = pinned(data)
result = {{"pins": found.pins, "loader": found.model_loader["revision"]}}
result["names"] = [
    message(lambda: resolve("dataset", "org/none", "main")),
    message(lambda: resolve("model", "org/none", "main")),
    message(lambda: resolve("dataset", "org/chat", "none")),
    message(lambda: resolve("dataset", "org/gated", "main")),
]
print(json.dumps(result), flush=True)
input()
result = {{"gone": message(lambda: pinned(data))}}
allowed = pinned(data, allow_unresolved=True)
result["allowed"] = allowed.pins
result["unresolved"] = allowed.unresolved
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

    assert gone["gone"].startswith("dataset org/chat at main: the hub cannot be reached (")
    assert "write a full commit" in gone["gone"] and "\n" not in gone["gone"]
    (line,) = gone["unresolved"]
    assert line.startswith("dataset org/chat at main, model org/tiny at v1: the hub cannot be reached (")
    assert gone["allowed"]["sources"] == {"chat": None}
    assert gone["allowed"]["model"] is gone["allowed"]["tokenizer"] is None
    assert gone["commits"]["sources"] == {"chat": COMMIT}
    assert gone["commits"]["model"] == gone["commits"]["tokenizer"] == COMMIT


@pytest.mark.slow
def test_pin_licences_are_those_of_the_cards_where_the_hub_is_asked(small_recipe, tmp_path: Path):
    small_recipe["model"] = {"model_name_or_path": "org/tiny"}
    small_recipe["dataset_mixture"]["datasets"] = [
        {"id": f"org/{name}", "split": name} for name in ("one", "two", "other", "none")
    ]
    code = MANY.format(root=str(ROOT))
    with HubServer() as server:
        server.publish("models", "org/tiny", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
        server.publish("datasets", "org/one", {"README.md": b"---\nlicense: mit\n---\n"})
        server.publish("datasets", "org/two", {"README.md": b"---\nlicense: [mit, odc-by]\n---\n"})
        server.publish("datasets", "org/other", {"README.md": b"---\nlicense: other\nlicense_name: ours\n---\n"})
        server.publish("datasets", "org/none", {"README.md": b"no metadata"})
        command = [sys.executable, "-c", code, json.dumps(small_recipe)]
        done = subprocess.run(
            command, env=server.environment(tmp_path), capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)[0]["licences"] for line in done.stdout.splitlines()]
    datasets = {"dataset org/one": "mit", "dataset org/two": "mit, odc-by", "dataset org/other": "ours"}
    assert found == [{"model org/tiny": "apache-2.0", **datasets}] * 2


MANY = """
import json, sys
sys.path.insert(0, {root!r})
from tests.pins.test_pinned import pinned

for allow_unresolved in (False, True):
    found = pinned(json.loads(sys.argv[1]), allow_unresolved=allow_unresolved)
    print(json.dumps([found.pins, found.unresolved]))
"""


@pytest.mark.slow
def test_pin_sources_of_one_hub_dataset_ask_for_its_commit_once_and_each_unknown_name_is_told_once(
    small_recipe, tmp_path: Path
):
    splits = [{"id": "org/chat", "split": f"s{number}"} for number in range(25)]
    small_recipe["dataset_mixture"]["datasets"] = splits
    with HubServer() as server:
        chat = server.publish("datasets", "org/chat", {"README.md": b"new"})
        old = server.publish("datasets", "org/chat", {"README.md": b"old"}, revision="v1")

        def run(data: dict[str, Any]) -> list[Any]:
            command = [sys.executable, "-c", MANY.format(root=str(ROOT)), json.dumps(data)]
            done = subprocess.run(
                command, env=server.environment(tmp_path), capture_output=True, text=True, timeout=60, check=False
            )
            return [json.loads(line) for line in done.stdout.splitlines()] or [done.stderr]

        found = run(small_recipe)
        first_calls = [request.path for request in server.requests]
        splits[3]["revision"] = "v1"
        for dataset in splits[5:10]:
            dataset["id"] = "org/none"
        (refused,) = run(small_recipe)
        small_recipe["dataset_mixture"]["datasets"] = [*splits[:5], *splits[10:]]
        mixed = run(small_recipe)
    assert found == [[{**found[0][0], "sources": {f"s{number}": chat for number in range(25)}}, []]] * 2
    assert len(first_calls) == 2 and all("org/chat" in path for path in first_calls)
    assert "dataset org/none: the hub knows no such dataset" in refused
    assert mixed[0][0]["sources"]["s3"] == old and mixed[0][0]["sources"]["s4"] == chat


def test_pin_names_that_the_hub_refuses_are_a_line_each_in_a_plan(small_recipe, tmp_path: Path):
    names = ["org/none", "org/none", "org/chat", "org/other"]
    small_recipe["dataset_mixture"]["datasets"] = [
        {"id": name, "split": f"s{number}"} for number, name in enumerate(names)
    ]
    code = MANY.format(root=str(ROOT)).replace("(False, True)", "(True,)")
    with HubServer() as server:
        chat = server.publish("datasets", "org/chat", {"README.md": b"new"})
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(small_recipe)],
            env=server.environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
        )
    pins, unresolved = json.loads(done.stdout)
    assert pins["sources"] == {"s0": None, "s1": None, "s2": chat, "s3": None}
    assert [line.split(":")[0] for line in unresolved] == ["dataset org/none", "dataset org/other"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "expected"),
    [(b"", "Timeout"), (b"HTTP/1.1 500 Oh\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", "500")],
)
def test_pin_in_a_plan_asks_a_hub_that_does_not_work_once_and_says_so_in_a_line(
    small_recipe, tmp_path: Path, answer: bytes, expected: str
):
    small_recipe["dataset_mixture"]["datasets"] = [{"id": f"org/chat{number}"} for number in range(5)]
    small_recipe["model"] = {"model_name_or_path": "org/tiny"}
    code = MANY.format(root=str(ROOT)).replace("(False, True)", "(True,)")
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as hub:

        def answer_each() -> None:
            while True:
                connections.append(hub.accept()[0])  # kept, or its end would be an answer
                if answer:
                    connections[-1].recv(10_000)
                    connections[-1].sendall(answer)

        Thread(target=answer_each, daemon=True).start()
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "1"}
        command = [sys.executable, "-c", code, json.dumps(small_recipe)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    pins, (line,) = json.loads(done.stdout)
    assert set(pins["sources"].values()) == {None} and pins["model"] is pins["tokenizer"] is None
    names = [*(f"dataset org/chat{number} at main" for number in range(5)), "model org/tiny at main"]
    assert line.startswith(f"{', '.join(names)}: the hub cannot be reached (") and expected in line
    assert "\n" not in line
    assert len(connections) == 1


def test_unresolved_is_an_error_of_the_user():
    assert issubclass(Unresolved, ValueError)
