"""The push: what the hub has is what the release has, once, by a token that is found nowhere afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import override, parse_recipe
from sft_core.release.push import may_not_write
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.release import RELEASED
from tests.data.sources.test_hub_token import holders
from tests.hub_server import HubServer
from tests.train.tiny import ROOT

TOKEN = "hf_OpenSesameForWriting9876543210"
REPOSITORY = ("models", "me/tiny")

# What a run does, of it: the check at its start, and the last step.
CLIENT = """
import json, logging, sys
logging.basicConfig(level=logging.DEBUG)
sys.path.insert(0, {root!r})
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from steps.start import prepare
from steps.release import PUSHED, RELEASED

recipe = parse_recipe(json.load(sys.stdin))
store = Store(recipe.runtime.store)
if sys.argv[1] == "prepare":
    prepare(recipe)
elif sys.argv[1] == "ensure":
    ref = store.ensure(PUSHED if recipe.hub else RELEASED, prepare(recipe))
    print(json.dumps([ref, store.manifest(ref)["counts"]]))
elif sys.argv[1] == "push":
    store.ensure(PUSHED, pin(recipe))
elif sys.argv[1] == "load":
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer
    found = ModelCard.load("me/tiny").data.to_dict()
    model, tokenizer = AutoModelForCausalLM.from_pretrained("me/tiny"), AutoTokenizer.from_pretrained("me/tiny")
    print(json.dumps([found, model.num_parameters(), tokenizer.chat_template]))
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        running.enrol(TOKEN, "me")
        yield running


Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run(server: HubServer, tmp_path: Path, recipe: dict[str, Any]) -> Run:
    """Runs the client with the recipe that pushes to me/tiny, and keys of it changed."""

    def start(what: str, *changes: str, token: str | None = TOKEN, pushes: bool = True) -> subprocess.CompletedProcess:
        data = override(recipe, (*(["hub.model_id=me/tiny"] if pushes else []), *changes))
        return subprocess.run(
            [sys.executable, "-c", CLIENT.format(root=str(ROOT)), what],
            env=server.environment(tmp_path) | ({"HF_TOKEN": token} if token is not None else {}),
            input=json.dumps(data),
            capture_output=True,
            text=True,
            timeout=120,
        )

    return start


def released(recipe: dict[str, Any]) -> dict[str, bytes]:
    """The files of the release, by name."""
    store = Store(recipe["runtime"]["store"])
    located = store.locate(RELEASED, pin(parse_recipe(recipe)), {})
    assert located.status == "hit" and located.ref is not None
    folder = store.path(located.ref) / "model"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_the_hub(server: HubServer, revision: str = "main") -> dict[str, bytes]:
    return server.commits[REPOSITORY][server.revisions[REPOSITORY][revision]]


def answer(done: subprocess.CompletedProcess) -> Any:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def num_commits(server: HubServer) -> int:
    return sum("/commit/" in request.path and request.status == 200 for request in server.requests)


@pytest.mark.long
def test_push_is_one_commit_of_the_releases_files_and_a_hit_pushes_nothing(server, run: Run, recipe, tmp_path: Path):
    ref, record = answer(run("ensure"))
    files = dict(on_the_hub(server))
    assert files.pop(".gitattributes") and files == released(recipe)
    assert {"README.md", "model.safetensors", "chat_template.jinja"} <= files.keys()
    assert num_commits(server) == 1 and server.access[REPOSITORY] == ("private", TOKEN)
    commit = server.revisions[REPOSITORY]["main"]
    url = f"{server.endpoint}/me/tiny/tree/{commit}"
    assert record == {"model_id": "me/tiny", "revision": "main", "commit": commit, "url": url}
    stored = Store(recipe["runtime"]["store"]).path(Ref(*ref)) / "pushed.json"
    assert json.loads(stored.read_text()) == record

    before = len(server.requests)
    assert answer(run("ensure")) == [ref, record]
    assert len(server.requests) == before, "not even a question"

    card, num_parameters, template = answer(run("load"))
    assert card["model-index"][0]["name"] == "tiny" and num_parameters > 1000 and "enable_thinking" in template


@pytest.mark.slow
def test_push_leaves_the_token_nowhere(server: HubServer, run: Run, tmp_path: Path):
    done = run("ensure")
    assert answer(done) and len(done.stderr.splitlines()) > 20, "the logs are captured"
    assert server.num_writes() > 3
    assert TOKEN not in done.stdout + done.stderr
    assert holders(tmp_path, TOKEN) == []


@pytest.mark.slow
def test_push_drops_what_an_earlier_checkpoint_had_and_keeps_the_rest(server: HubServer, run: Run, recipe):
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter/adapter_config.json"]
    others = {"LICENSE": b"mine", "images/curve.png": b"png", ".gitattributes": b"lfs"}
    server.publish(*REPOSITORY, {**dict.fromkeys(old, b"old"), "README.md": b"# old\n", **others})
    server.restrict(*REPOSITORY, token=TOKEN, access="private")
    answer(run("ensure"))
    assert on_the_hub(server) == {**released(recipe), **others}
    assert num_commits(server) == 1


@pytest.mark.slow
def test_push_to_a_branch_leaves_main_as_it_is(server: HubServer, run: Run, recipe):
    _, record = answer(run("ensure", "hub.revision=v2", "hub.private=false"))
    assert record["revision"] == "v2" and record["commit"] == server.revisions[REPOSITORY]["v2"]
    assert on_the_hub(server, "v2").items() >= released(recipe).items()
    assert set(on_the_hub(server)) == {".gitattributes"} and REPOSITORY not in server.access


@pytest.mark.slow
def test_without_a_hub_section_nothing_is_sent(server: HubServer, run: Run):
    ref, _ = answer(run("ensure", pushes=False))
    assert ref[0] == "release" and server.requests == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "role", "expected"),
    [
        (None, "write", "HF_TOKEN: not set in the environment; hub.model_id wants a token that may write"),
        (" ", "write", "HF_TOKEN: not set in the environment; hub.model_id wants a token that may write"),
        ("hf_NobodyKnowsThisOne", "write", "HF_TOKEN: the hub does not know this token; set one that may write"),
        ("hf_two words\x0b", "write", "HF_TOKEN: it holds a character that no token has"),
        (TOKEN, "read", "hub.model_id: found me/tiny; HF_TOKEN may only read; make a token that may write, on the hub"),
    ],
)
def test_token_that_cannot_push_ends_the_run_before_any_work(
    server: HubServer, run: Run, tmp_path: Path, token: str | None, role: str, expected: str
):
    server.enrol(TOKEN, "me", role=role)
    done = run("prepare", f"runtime.store={tmp_path}/empty", token=token)
    assert done.returncode == 1
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("ValueError: ")]
    assert told.startswith(f"ValueError: {expected}")
    assert list((tmp_path / "empty").rglob("manifest.json")) == [] and server.num_writes() == 0
    for secret in (TOKEN, (token or "").strip()):
        assert not secret or secret not in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("access", "private", "expected"),
    [
        ("public", "true", "hub.private: found true; me/tiny is there and public; make it private on the hub, or"),
        ("private", "false", "hub.private: found false; me/tiny is there and private; make it public on the hub, or"),
    ],
)
@pytest.mark.parametrize("what", ["prepare", "push"])
def test_repository_that_others_see_than_asked_is_refused(server, run: Run, access, private, expected, what):
    server.publish(*REPOSITORY, {"README.md": b"# old\n"})
    server.restrict(*REPOSITORY, token=TOKEN, access=access)
    done = run(what, f"hub.private={private}")
    assert done.returncode == 1 and f"ValueError: {expected}" in done.stderr
    assert server.num_writes() == 0


@pytest.mark.slow
def test_push_that_is_refused_records_nothing_and_the_next_run_pushes(server: HubServer, run: Run, recipe):
    server.enrol(TOKEN, "me", role="read")
    done = run("push")
    assert done.returncode == 1 and TOKEN not in done.stderr
    assert "OSError: push to me/tiny: the hub refused it (403: " in done.stderr
    assert not (Path(recipe["runtime"]["store"]) / "pushed").exists()
    server.enrol(TOKEN, "me")
    answer(run("ensure"))
    assert on_the_hub(server).items() >= released(recipe).items()


@pytest.mark.slow
def test_push_to_a_hub_out_of_reach_says_what_stays(server: HubServer, run: Run):
    server.__exit__()
    done = run("push")
    assert done.returncode == 1 and TOKEN not in done.stderr
    assert "ConnectionError: push to me/tiny: the hub cannot be reached (" in done.stderr
    assert "what is built stays" in done.stderr


ME = {"name": "me", "orgs": [{"name": "org", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]}


def fine_grained(*scopes: tuple[str, list[str]]) -> dict[str, Any]:
    scoped = [{"entity": {"name": name}, "permissions": permissions} for name, permissions in scopes]
    return {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": scoped}}}


@pytest.mark.parametrize(
    ("model_id", "auth", "expected"),
    [
        ("me/x", {"accessToken": {"role": "write"}}, None),
        ("org/x", {"accessToken": {"role": "write"}}, None),
        ("club/x", {"accessToken": {"role": "write"}}, "HF_TOKEN is of me, who may only read in club"),
        ("you/x", {"accessToken": {"role": "write"}}, "HF_TOKEN is of me, who may write for club, me, org"),
        ("me/x", {"accessToken": {"role": "read"}}, "HF_TOKEN may only read; make a token that may write, on the hub"),
        ("me/x", fine_grained(("me", ["repo.content.read", "repo.write"])), None),
        ("me/x", fine_grained(("me/x", ["repo.write"])), None),
        ("me/x", fine_grained(("me", ["repo.content.read"]), ("org", ["repo.write"])), "HF_TOKEN has no permission"),
        ("me/x", fine_grained(), "HF_TOKEN has no permission to write to repositories of me; add it to the token"),
    ],
)
def test_who_may_write(model_id: str, auth: dict[str, Any], expected: str | None):
    fault = may_not_write({**ME, "auth": auth}, model_id)
    assert fault is None if expected is None else str(fault).startswith(expected)
