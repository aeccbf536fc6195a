"""What is gated or private is had with a token from the environment, which is found nowhere afterwards."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sft_core.recipe.parse import parse_recipe
from tests.data.sources.test_sources import ROOT, repository
from tests.hub_server import HubServer

TOKEN = "hf_SesameOpenNowAtOnce0123456789"
QUICKSTART = ROOT / "configs" / "quickstart" / "tokenizer"

CLIENT = """
    import json, logging, sys
    logging.basicConfig(level=logging.DEBUG)
    sys.path.insert(0, {root!r})
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe
    from sft_core.store.store import Store
    from steps.plan import plan
    from steps.tokenize import TOKENS

    data = json.load(sys.stdin)
    pinned = pin(parse_recipe(data))
    store = Store(data["runtime"]["store"])
    store.ensure(TOKENS, pinned, source="some")
    print([(one.stage.name, one.status) for one in plan(store, pinned)], pinned)
"""


def recipe(tmp_path: Path, dataset: str, model: str) -> dict[str, Any]:
    return {
        "name": "test",
        "model": {"model_name_or_path": model},
        "chat_template": {"template": "thinking"},
        "dataset_mixture": {"datasets": [{"name": "some", "id": dataset, "config": "SFT", "split": "b_think"}]},
        "evaluation": {"min_report_rows": 0},
        "runtime": {"store": str(tmp_path / "store")},
    }


@pytest.fixture
def build(tmp_path: Path):
    """Builds the tokens of a hub dataset for a hub model's tokenizer, both behind the token."""

    def run(
        token: str | None, access: str = "private", dataset: str = "org/chat"
    ) -> tuple[subprocess.CompletedProcess, HubServer]:
        tokenizer = {path.name: path.read_bytes() for path in QUICKSTART.iterdir()}
        with HubServer() as server:
            server.publish("datasets", "org/chat", repository("x"))
            server.publish("models", "org/tiny", {"config.json": b'{"model_type": "llama"}', **tokenizer})
            for kind, name in (("datasets", "org/chat"), ("models", "org/tiny")):
                server.restrict(kind, name, token=TOKEN, access=access)
            done = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(CLIENT).format(root=str(ROOT))],
                env=server.environment(tmp_path) | ({"HF_TOKEN": token} if token else {}),
                input=json.dumps(recipe(tmp_path, dataset, "org/tiny")),
                capture_output=True,
                text=True,
                timeout=60,
            )
        return done, server

    return run


def holders(folder: Path, token: str) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [path for path in files if token.encode() in path.read_bytes()]


@pytest.mark.long
@pytest.mark.parametrize("access", ["gated", "private"])
def test_token_of_the_environment_opens_dataset_and_tokenizer_and_is_written_nowhere(
    build, tmp_path: Path, access: str
):
    done, server = build(TOKEN, access)
    assert done.returncode == 0, done.stderr
    assert "('tokens', 'hit')" in done.stdout and len(done.stderr.splitlines()) > 20, "the logs are captured"
    assert all(request.has_authorization for request in server.requests)
    assert any(path.name == "manifest.json" for path in (tmp_path / "store").rglob("*"))
    assert holders(tmp_path / "store", TOKEN) == [] and holders(tmp_path, TOKEN) == []
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "access", "expected"),
    [
        (None, "private", "dataset org/chat: the hub knows no such dataset (private ones need HF_TOKEN)"),
        ("hf_another", "private", "dataset org/chat: the hub knows no such dataset (private ones need HF_TOKEN)"),
        (None, "gated", "ask for access and set HF_TOKEN"),
        ("hf_another", "gated", "ask for access and set HF_TOKEN"),
        ("hf_two words\x0b", "private", "HF_TOKEN: it holds a character that no token has"),
        ("hf_é", "gated", "HF_TOKEN: it holds a character that no token has"),
    ],
)
def test_token_that_is_missing_or_wrong_is_told_of_and_not_shown(build, token: str | None, access: str, expected: str):
    done, _ = build(token, access)
    assert done.returncode == 1
    assert expected in done.stderr
    for secret in (TOKEN, token) if token else (TOKEN,):
        assert secret not in done.stderr and ascii(secret)[1:-1] not in done.stderr and secret not in done.stdout


@pytest.mark.parametrize("key", ["hub_token", "token"])
def test_token_in_a_recipe_is_refused_and_not_shown(tmp_path: Path, key: str):
    data = recipe(tmp_path, "org/chat", "org/tiny") | {"training": {"extra": {key: TOKEN}}}
    with pytest.raises(ValueError) as error:
        parse_recipe(data)
    assert str(error.value).startswith(f"training: extra.{key}: a recipe is stored with what it makes; set HF_TOKEN")
    assert TOKEN not in str(error.value)
