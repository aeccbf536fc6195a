"""The real hub clients, unmodified, each in a process of its own, against the server of tests/hub_server.py."""

import io
import json
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.hub_server import HubServer

CONFIGS = ("SFT", "Mid")
SPLITS = ("a_no_think", "b_think", "c_think")
NUM_ROWS = 5


def rows(tag: str) -> list[dict]:
    return [
        {"id": f"{tag} {i}", "messages": [{"role": "user", "content": f"question {i}"}], "padding": "x" * 40}
        for i in range(NUM_ROWS)
    ]


def as_jsonl(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def as_parquet(records: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def chat_repository(extension: str) -> dict[str, bytes]:
    """Several configs of several splits of two files each, declared in the card: the layout of smoltalk2."""
    encode = {"jsonl": as_jsonl, "parquet": as_parquet}[extension]
    card = "---\nconfigs:\n"
    files = {}
    for config in CONFIGS:
        card += f"- config_name: {config}\n  data_files:\n"
        for split in SPLITS:
            card += f"  - split: {split}\n    path: {config}/{split}*.{extension}\n"
            files |= {f"{config}/{split}-{k}.{extension}": encode(rows(f"{config} {split} {k}")) for k in range(2)}
    return {"README.md": f"{card}---\n".encode(), **files}


EXPECTED_IDS = [f"SFT b_think {k} {i}" for k in range(2) for i in range(NUM_ROWS)]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def run_client(server: HubServer, tmp_path: Path) -> Iterator:
    """Runs code that fills the dict `result`; any host but the server is behind a proxy that lets none pass."""
    strangers: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def refuse_each() -> None:
            while True:
                connection, _ = proxy.accept()
                with connection:
                    strangers.append(connection.recv(1000))

        Thread(target=refuse_each, daemon=True).start()
        proxy_url = f"http://127.0.0.1:{proxy.getsockname()[1]}"

        def run(code: str, **environment: str) -> dict:
            names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
            environment = server.environment(tmp_path) | dict.fromkeys(names, proxy_url) | environment
            code = f"result = {{}}\n{textwrap.dedent(code)}\nimport json\nprint(json.dumps(result))"
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        yield run
    assert strangers == []


NAME_OF_ERROR = """
def name_of_error(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
"""


def test_commit_same_files_is_the_same_and_a_changed_file_moves_it(tmp_path: Path):
    folder = tmp_path / "datasets/org/chat/main"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_bytes(b"card")
    (folder / "data/train.jsonl").write_bytes(b"{}\n")
    server, again = HubServer(tmp_path), HubServer(tmp_path)
    first = server.revisions["datasets", "org/chat"]["main"]
    assert first == again.revisions["datasets", "org/chat"]["main"]
    assert len(first) == 40

    (folder / "data/train.jsonl").write_bytes(b"{} \n")
    server.publish_folders()
    second = server.revisions["datasets", "org/chat"]["main"]
    assert second != first
    assert server.commits["datasets", "org/chat"][first]["data/train.jsonl"] == b"{}\n"
    renamed = server.publish("datasets", "org/chat", {"README.md": b"card", "train.jsonl": b"{}\n"})
    assert renamed not in (first, second)


@pytest.mark.slow
def test_hub_client_revisions_files_and_errors_are_those_of_the_hub(server: HubServer, run_client):
    old = server.publish("datasets", "org/chat", {"README.md": b"old", "data/a.txt": b"a"})
    new = server.publish("datasets", "org/chat", {"README.md": b"new", "data/a.txt": b"a"})
    tagged = server.publish("models", "org/tiny", {"config.json": b"{}"}, revision="v1/rc")
    server.publish("datasets", "org/gated", {"README.md": b"card"})
    server.restrict("datasets", "org/gated", token="sesame")
    server.publish("datasets", "org/private", {"README.md": b"card"})
    server.restrict("datasets", "org/private", token="sesame", access="private")

    result = run_client(f"""
        {textwrap.indent(NAME_OF_ERROR, " " * 8).strip()}
        from pathlib import Path
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        api = HfApi()
        result["shas"] = [
            api.dataset_info("org/chat").sha,
            api.dataset_info("org/chat", revision="main").sha,
            api.dataset_info("org/chat", revision="{old}").sha,
            api.model_info("org/tiny", revision="v1/rc").sha,
            api.resolve_revision("org/chat", repo_type="dataset", revision="main").resolved,
        ]
        result["files"] = api.list_repo_files("org/chat", repo_type="dataset", revision="{old}")
        result["top"] = [entry.path for entry in api.list_repo_tree("org/chat", repo_type="dataset")]
        result["folder"] = [entry.path for entry in api.list_repo_tree("org/chat", "data", repo_type="dataset")]
        for name, revision in (("main", None), ("old", "{old}")):
            path = hf_hub_download("org/chat", "README.md", repo_type="dataset", revision=revision)
            result[name] = [Path(path).parent.name, Path(path).read_text()]
        for _ in range(2):
            snapshot = Path(snapshot_download("org/chat", repo_type="dataset", revision="{new}"))
        result["snapshot"] = sorted(str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file())
        result["errors"] = [
            name_of_error(lambda: api.dataset_info("org/none")),
            name_of_error(lambda: api.dataset_info("org/tiny")),
            name_of_error(lambda: api.dataset_info("org/chat", revision="none")),
            name_of_error(lambda: hf_hub_download("org/chat", "README.md", repo_type="dataset", revision="0" * 40)),
            name_of_error(lambda: hf_hub_download("org/chat", "none.txt", repo_type="dataset")),
            name_of_error(lambda: hf_hub_download("org/gated", "README.md", repo_type="dataset")),
            name_of_error(lambda: hf_hub_download("org/gated", "README.md", repo_type="dataset", token="wrong")),
            name_of_error(lambda: api.dataset_info("org/private")),
        ]
        result["gated"] = api.dataset_info("org/gated").gated
        path = hf_hub_download("org/gated", "README.md", repo_type="dataset", token="sesame")
        result["gated_text"] = Path(path).read_text()
        result["private"] = api.dataset_info("org/private", token="sesame").private
    """)

    assert result["shas"] == [new, new, old, tagged, new]
    assert result["files"] == ["README.md", "data/a.txt"]
    assert result["top"] == ["README.md", "data"]
    assert result["folder"] == ["data/a.txt"]
    assert result["main"] == [new, "new"]
    assert result["old"] == [old, "old"]
    assert result["snapshot"] == ["README.md", "data/a.txt"]
    assert result["errors"] == [
        "RepositoryNotFoundError",
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "RevisionNotFoundError",
        "RemoteEntryNotFoundError",
        "GatedRepoError",
        "GatedRepoError",
        "RepositoryNotFoundError",
    ]
    assert result["gated"] == "auto"
    assert result["gated_text"] == "card"
    assert result["private"] is True
    assert server.num_downloads("data/a.txt") == 1
    assert server.num_downloads() == 4
    assert [r.status for r in server.requests if r.has_authorization] == [403, 200, 200, 200]


@pytest.mark.slow
def test_load_dataset_one_split_at_a_commit_gives_its_rows_in_order(server: HubServer, run_client):
    commits = {ext: server.publish("datasets", f"org/{ext}", chat_repository(ext)) for ext in ("jsonl", "parquet")}
    for extension in commits:  # Another commit on main: the loads below must not see it.
        server.publish("datasets", f"org/{extension}", {"README.md": b"empty"})

    result = run_client(f"""
        {textwrap.indent(NAME_OF_ERROR, " " * 8).strip()}
        from datasets import get_dataset_config_names, load_dataset
        def load(repo_id, revision, streaming, **options):
            options = {{"name": "SFT", "split": "b_think"}} | options
            return load_dataset(repo_id, revision=revision, streaming=streaming, **options)
        for extension, commit in {commits}.items():
            for streaming in (True, False):
                dataset = load("org/" + extension, commit, streaming).select_columns(["id"])
                result[f"{{extension}} {{streaming}}"] = list(dataset)
        result["columns"] = load("org/parquet", commit, True, columns=["id"]).column_names
        result["configs"] = get_dataset_config_names("org/jsonl", revision="{commits["jsonl"]}")
        result["errors"] = [
            name_of_error(lambda: load("org/none", None, True)),
            name_of_error(lambda: load("org/jsonl", "none", True)),
            name_of_error(lambda: load("org/jsonl", "{commits["jsonl"]}", True, name="none")),
            name_of_error(lambda: load("org/jsonl", "{commits["jsonl"]}", True, split="none")),
        ]
    """)

    for extension in commits:
        for streaming in (True, False):
            assert [row["id"] for row in result[f"{extension} {streaming}"]] == EXPECTED_IDS
            assert result[f"{extension} {streaming}"][0].keys() == {"id"}
    assert result["columns"] == ["id"]
    assert result["configs"] == list(CONFIGS)
    assert result["errors"] == ["DatasetNotFoundError", "DatasetNotFoundError", "ValueError", "ValueError"]
    assert {
        r.path.split("@")[-1].split("/resolve/")[1].split("/")[0] for r in server.requests if "/SFT/" in r.path
    } == (set(commits.values()))
    assert server.num_downloads("SFT/b_think-1.jsonl") == 2  # once streaming, once not
    assert server.num_downloads("SFT/c_think-0.jsonl") == 1  # not streaming, load_dataset takes each split
    assert not any("/Mid/" in request.path for request in server.requests)


def tiny_llama(weight: float) -> dict[str, bytes]:
    """The files of a one-layer model whose every weight has one value, and of its tokenizer of three words."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 3, "hidden_size": 8}
    config |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": False}
    layer = "model.layers.0."
    shapes = {f"{layer}self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"}
    shapes |= {f"{layer}mlp.{name}_proj.weight": (8, 8) for name in ("gate", "up", "down")}
    shapes |= {f"{layer}{name}_layernorm.weight": (8,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (8,), "model.embed_tokens.weight": (3, 8), "lm_head.weight": (3, 8)}
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "hello": 1, "hub": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(
            {name: np.full(shape, weight, np.float32) for name, shape in shapes.items()}, metadata={"format": "pt"}
        ),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}',
    }


@pytest.mark.long
def test_from_pretrained_tiny_model_at_a_commit_loads_that_commit(server: HubServer, run_client):
    commit = server.publish("models", "org/tiny", tiny_llama(weight=1.0))
    assert server.publish("models", "org/tiny", tiny_llama(weight=2.0)) != commit

    result = run_client(f"""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        for _ in range(2):
            tokenizer = AutoTokenizer.from_pretrained("org/tiny", revision="{commit}")
            model = AutoModelForCausalLM.from_pretrained("org/tiny", revision="{commit}")
        result["ids"] = tokenizer("hello hub there").input_ids
        result["weight"] = model.lm_head.weight[0, 0].item()
    """)
    assert result == {"ids": [1, 2, 0], "weight": 1.0}
    assert server.num_downloads("model.safetensors") == 1


def test_server_after_its_end_refuses_clients_that_kept_a_connection(tmp_path: Path):
    with HubServer() as server:
        server.publish("datasets", "org/chat", {"README.md": b"card"})
        code = """
            from huggingface_hub import HfApi
            print(HfApi().dataset_info("org/chat").sha, flush=True)
            input()
            try:
                print(HfApi().dataset_info("org/chat").sha)
            except Exception as error:
                print(type(error).__name__)
        """
        client = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=server.environment(tmp_path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert len(client.stdout.readline().strip()) == 40
    output, _ = client.communicate("\n", timeout=30)
    assert output.strip() in ("ConnectError", "RemoteProtocolError", "ReadError")


def test_hub_client_uploads_weights_by_lfs_and_other_files_in_the_commit(server: HubServer, run_client, tmp_path: Path):
    server.enrol("sesame", "me", orgs={"org": "write", "other": "read"})
    weights = save({"w": np.arange(6, dtype=np.float32)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\n# card\n")
    result = run_client(
        NAME_OF_ERROR
        + textwrap.dedent(f"""
        from huggingface_hub import HfApi, ModelCard, hf_hub_download

        api = HfApi(token="sesame")
        result["name"] = api.whoami()["name"]
        result["created"] = [str(api.create_repo("org/tiny", private=True, exist_ok=True)) for _ in range(2)]
        api.create_branch("org/tiny", branch="v2", exist_ok=True)
        result["commits"] = [api.upload_folder(repo_id="org/tiny", folder_path={str(folder)!r}).oid for _ in range(2)]
        result["licence"] = api.model_info("org/tiny").card_data.license
        result["errors"] = [
            name_of_error(lambda: HfApi(token="wrong").whoami()),
            name_of_error(lambda: api.create_repo("other/tiny")),
            name_of_error(lambda: HfApi(token="wrong").create_repo("org/tiny2")),
            name_of_error(lambda: HfApi(token="wrong").upload_folder(repo_id="org/tiny", folder_path={str(folder)!r})),
            name_of_error(lambda: api.upload_file(path_or_fileobj=b"---\\na: [\\n---\\n", path_in_repo="README.md",
                                                  repo_id="org/tiny")),
        ]
        with open(hf_hub_download("org/tiny", "model.safetensors", token="sesame"), "rb") as file:
            result["size"] = len(file.read())
        """)
    )
    assert result["name"] == "me" and len(set(result["created"])) == 1
    commits = server.commits["models", "org/tiny"]
    assert set(result["commits"]) == {server.revisions["models", "org/tiny"]["main"]}, "nothing changed: no commit"
    assert commits[result["commits"][0]]["model.safetensors"] == weights and result["size"] == len(weights)
    assert set(commits[server.revisions["models", "org/tiny"]["v2"]]) == {".gitattributes"}
    assert server.access["models", "org/tiny"] == ("private", "sesame")
    assert [request.status for request in server.requests if request.method == "PUT"] == [200]
    assert result["licence"] == "mit"
    assert result["errors"] == [*["HfHubHTTPError"] * 4, "ValueError"]
