"""Sources through the real stage: each row of a file or of the hub is kept, or rejected with its place and reason."""

import gzip
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sft_core.data.sources.files import list_files, read_files
from sft_core.data.sources.splits import prompt_hash
from steps.download import CONVERSATIONS
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[3]


def row(number: int | str) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"é{number}"}]
    return {"messages": messages, "answer": str(number)}


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows).encode()


def conversations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in pq.read_table(folder / "conversations.parquet")["conversation"].to_pylist()]


def answers(folder: Path) -> list[str]:
    return [conversation["answer"] for conversation in conversations(folder)]


def rejects(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def download(pinned: Callable, ensure: Callable) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Builds the conversations of some paths: the folder and its counts, which must add up."""

    def build(*paths: Path, mixture: dict | None = None, limit: int | None = None, **dataset: Any) -> Any:
        source = {"name": "some", "path": [str(path) for path in paths], **dataset}
        folder, manifest = ensure(CONVERSATIONS, pinned(source, mixture=mixture or {}, limit=limit), source="some")
        counts = manifest["counts"]
        assert counts["rows"] == counts["conversations"] + sum(counts["rejected"].values())
        assert counts["conversations"] == len(conversations(folder))
        assert sum(counts["rejected"].values()) == len(rejects(folder))
        return folder, counts

    return build


ROWS = [row(number) for number in range(5)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", as_lines(ROWS)),
        ("a.json", as_lines(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS[:2])) + gzip.compress(as_lines(ROWS[2:]))),
        ("a.jsonl.zst", zstandard.compress(as_lines(ROWS))),
        ("a.json.zst", zstandard.compress(as_lines(ROWS[:2])) + zstandard.compress(as_lines(ROWS[2:]))),
        ("a.jsonl", b"\xef\xbb\xbf" + as_lines(ROWS).replace(b"\n", b"\r\n\r\n").rstrip()),
    ],
    ids=[
        "jsonl",
        "json lines",
        "json list",
        "gz of two members",
        "zst",
        "zst of two frames",
        "bom, crlf, blank lines, no last newline",
    ],
)
def test_file_of_json_every_row_is_read_in_order(tmp_path: Path, download, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    folder, counts = download(tmp_path / name)
    assert conversations(folder) == ROWS
    assert counts == {"rows": 5, "conversations": 5, "rejected": {}}


def test_parquet_none_in_a_column_counts_as_not_given(tmp_path: Path, download):
    rows = [
        {**row(0), "chat_template_kwargs": {"enable_thinking": True, "header": None}},
        {**row(1), "chat_template_kwargs": {"enable_thinking": None, "header": False}},
    ]
    rows[0]["messages"][1]["reasoning_content"] = "hm"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = conversations(download(tmp_path / "a.parquet")[0])
    assert [conversation["kwargs"] for conversation in found] == [{"enable_thinking": True}, {"header": False}]
    assert [message.get("reasoning_content") for message in found[0]["messages"]] == [None, "hm"]
    assert found[1]["messages"] == row(1)["messages"]


def test_conversations_ids_and_hashes_are_those_of_the_rows(write_rows, download):
    folder, _ = download(write_rows("a.jsonl", [*ROWS, ROWS[0]]))
    table = pq.read_table(folder / "conversations.parquet")
    ids = table["row_id"].to_pylist()
    assert ids[0] == ids[5]
    assert len(set(ids)) == 5
    assert table["prompt_hash"].to_pylist() == [prompt_hash(one) for one in [*ROWS, ROWS[0]]]


def test_globs_and_several_paths_give_the_files_sorted_within_each(tmp_path: Path, write_rows, download):
    (tmp_path / "sub").mkdir()
    write_rows("part-1.jsonl", [row(1)])
    write_rows("part-0.jsonl", [row(0)])
    write_rows("sub/part-2.jsonl", [row(2)])
    last = write_rows("a.jsonl", [row(9)])
    assert answers(download(tmp_path / "**" / "part-*.jsonl", last)[0]) == ["0", "1", "2", "9"]


def test_invalid_lines_are_rejected_with_line_and_reason_and_the_others_kept(tmp_path: Path, download):
    surrogate = b'{"messages":[{"role":"user","content":"\\ud800"},{"role":"assistant","content":"x"}]}\n'
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(ROWS[:1]) + b'{"messages": \n\n"\xff"\n' + surrogate + b"[1]\n" + as_lines(ROWS[1:]))
    folder, counts = download(path, mixture={"max_rejected_share": 0.9})
    assert answers(folder) == ["0", "1", "2", "3", "4"]
    assert counts["rejected"] == {"invalid_json": 1, "invalid_unicode": 1, "invalid_utf8": 1, "not_an_object": 1}
    assert [(reject["where"], reject["reason"]) for reject in rejects(folder)] == [
        (f"{path.name}:2", "invalid_json"),
        (f"{path.name}:4", "invalid_utf8"),
        (f"{path.name}:5", "invalid_unicode"),
        (f"{path.name}:6", "not_an_object"),
    ]
    assert rejects(folder)[1]["detail"] == "byte 1 of the line is not UTF-8"


def test_parquet_invalid_row_is_rejected_with_its_number(tmp_path: Path, download):
    rows = [row(number) for number in range(1500)]
    rows[1200]["messages"][1]["role"] = "bot"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    folder, counts = download(tmp_path / "a.parquet")
    assert counts == {"rows": 1500, "conversations": 1499, "rejected": {"unknown_role": 1}}
    assert rejects(folder)[0]["where"] == "a.parquet: row 1200"


def test_limit_reads_the_first_rows_only(write_rows, download):
    folder, counts = download(write_rows("a.jsonl", [*ROWS, "not read"]), limit=3)
    assert answers(folder) == ["0", "1", "2"]
    assert counts == {"rows": 3, "conversations": 3, "rejected": {}}


def test_columns_others_are_left_out(tmp_path: Path, write_rows, download):
    pq.write_table(pa.Table.from_pylist([row(0)]), tmp_path / "a.parquet")
    for file in (write_rows("a.jsonl", [row(0)]), tmp_path / "a.parquet"):
        assert conversations(download(file, columns=["messages"])[0]) == [{"messages": row(0)["messages"]}]


def test_format_given_reads_rows_by_it(write_rows, download):
    folder, _ = download(write_rows("a.jsonl", [{**row(0), "text": "raw"}]), format="text")
    assert conversations(folder) == [{"text": "raw"}]


# Failures


def test_rejected_rows_over_the_share_fail_with_counts_and_examples(tmp_path: Path, write_rows, download):
    path = write_rows("a.jsonl", [*ROWS, {"messages": [{"role": "user", "content": "x"}]}, {"question": 1}])
    with pytest.raises(ValueError, match=r"2 of 7 rows are rejected") as error:
        download(path, mixture={"max_rejected_share": 0.25})
    message = str(error.value)
    assert "{'no_assistant_turn': 1, 'no_messages': 1}" in message
    assert "max_rejected_share (0.25)" in message
    assert f"{path.name}:6: no_assistant_turn: the conversation has no assistant turn" in message
    assert "while building conversations some" in error.value.__notes__[0]
    assert not list((tmp_path / "store" / "conversations").glob("*"))
    assert download(path, mixture={"max_rejected_share": 2 / 7})[1]["conversations"] == 5


def test_rejected_rows_all_of_them_fail_at_any_share(write_rows, download):
    path = write_rows("a.jsonl", [[row(0), row(1)]])
    with pytest.raises(ValueError, match=r"none of 1 rows can be used:\n.*a row is a JSON object; found list"):
        download(path, mixture={"max_rejected_share": 1.0})


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.jsonl.gz", b"")])
def test_empty_source_fails(tmp_path: Path, download, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: the source is empty"):
        download(tmp_path / name)


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_compressed_file_cut_off_or_damaged_fails(tmp_path: Path, download, suffix: str, compress: Callable):
    path = tmp_path / f"a.jsonl.{suffix}"
    whole = compress(as_lines([row(number) for number in range(5000)]))
    for content in (whole[: len(whole) // 2], as_lines(ROWS)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a.jsonl.{suffix}: cannot be decompressed to its end"):
            download(path)


def test_missing_file_is_named_with_the_folder_looked_in(tmp_path: Path, download):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/none-\*.jsonl: no such file \(looked in {Path.cwd()}\)"):
        download(tmp_path / "none-*.jsonl")


def test_unknown_suffix_names_the_known_ones(tmp_path: Path, download):
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"a.csv: a source is .jsonl or .json \(also .gz, .zst\) or .parquet"):
        download(tmp_path / "a.*")


def test_parquet_missing_column_names_those_it_has(tmp_path: Path, download):
    pq.write_table(pa.Table.from_pylist([row(0)]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: no column 'message'; it has messages, answer"):
        download(tmp_path / "a.parquet", columns=["message"])


def test_files_changed_after_the_pin_fail(write_rows, pinned, ensure):
    recipe = pinned({"name": "some", "path": str(write_rows("a.jsonl", ROWS))})
    write_rows("a.jsonl", ROWS[1:])
    with pytest.raises(ValueError, match="the files changed since this run began"):
        ensure(CONVERSATIONS, recipe, source="some")


def test_pin_moves_with_content_and_file_name_but_not_with_the_folder(tmp_path: Path, write_rows, pinned):
    (tmp_path / "moved").mkdir()
    paths = [write_rows(name, ROWS) for name in ("a.jsonl", "b.jsonl", "moved/a.jsonl")]
    first, renamed, moved = (pinned({"name": "s", "path": str(path)}).pins["sources"]["s"] for path in paths)
    assert first == moved != renamed
    write_rows("a.jsonl", ROWS[1:])
    assert pinned({"name": "s", "path": str(paths[0])}).pins["sources"]["s"] != first


# The hub

CLIENT = """
    import json, sys
    import pyarrow.parquet as pq
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe
    from sft_core.store.store import Store
    from steps.download import CONVERSATIONS

    job = json.load(sys.stdin)
    store, results = Store(job["store"]), []
    for dataset in job["datasets"]:
        recipe = parse_recipe({
            "name": "test",
            "model": {"config": {"model_type": "llama"}, "tokenizer_name_or_path": job["tokenizer"]},
            "dataset_mixture": {"datasets": [{"name": "some", **dataset}]},
        })
        try:
            ref = store.ensure(CONVERSATIONS, pin(recipe), source="some")
        except Exception as error:
            results.append({"error": type(error).__name__, "message": str(error)})
            continue
        rows = pq.read_table(store.path(ref) / "conversations.parquet")["conversation"].to_pylist()
        results.append({"ref": str(ref), "rows": rows, "manifest": store.manifest(ref)})
    print(json.dumps(results))
"""


def run_client(server: HubServer, tmp_path: Path, datasets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What becomes of each dataset, downloaded in a process that knows no hub but the server."""
    tokenizer = str(ROOT / "configs" / "quickstart" / "tokenizer")
    job = {"store": str(tmp_path / "store"), "tokenizer": tokenizer, "datasets": datasets}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CLIENT)],
        env=server.environment(tmp_path) | {"PYTHONPATH": str(ROOT)},
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def repository(tag: str) -> dict[str, bytes]:
    """Two configs of two splits of two files; `b_think` has a column that `a_no_think` lacks."""
    card = "---\nconfigs:\n"
    files = {}
    for config in ("SFT", "Mid"):
        card += f"- config_name: {config}\n  data_files:\n"
        for split in ("a_no_think", "b_think"):
            card += f"  - split: {split}\n    path: {config}/{split}-*.parquet\n"
            for part in range(2):
                rows = [row(f"{tag} {config} {split} {part} {number}") for number in range(2)]
                if split == "b_think":
                    rows = [{**one, "chat_template_kwargs": {"enable_thinking": True}} for one in rows]
                sink = pa.BufferOutputStream()
                pq.write_table(pa.Table.from_pylist(rows), sink)
                files[f"{config}/{split}-{part}.parquet"] = sink.getvalue().to_pybytes()
    return {"README.md": f"{card}---\n".encode(), **files}


@pytest.mark.slow
def test_hub_one_split_at_a_commit_and_clear_messages_for_what_is_not_there(tmp_path: Path):
    dataset = {"id": "org/chat", "config": "SFT", "split": "b_think"}
    narrow = dataset | {"columns": ["messages", "chat_template_kwargs"]}
    lines = {"id": "org/lines", "columns": ["messages"]}
    with HubServer() as server:
        old = server.publish("datasets", "org/chat", repository("old"))
        server.publish("datasets", "org/lines", {"train.jsonl": as_lines(ROWS)})
        first, narrowed, of_lines = run_client(server, tmp_path, [dataset, narrow, lines])
        fetched = [request.path for request in server.requests if "/resolve/" in request.path]

        new = server.publish("datasets", "org/chat", repository("new"))
        later = [
            dataset,
            dataset | {"revision": old, "format": "messages"},  # another key: it is not in the store
            dataset | {"id": "org/none"},
            dataset | {"revision": "v9"},
            dataset | {"split": "c_think"},
            dataset | {"config": "none"},
            dataset | {"columns": ["message"]},
        ]
        moved, by_commit, *failed = run_client(server, tmp_path, later)

    expected = [f"old SFT b_think {part} {number}" for part in range(2) for number in range(2)]
    rows = [json.loads(text) for text in first["rows"]]
    assert [one["answer"] for one in rows] == expected
    assert [one["kwargs"] for one in rows] == [{"enable_thinking": True}] * 4
    assert rows[0]["messages"] == row(expected[0])["messages"]
    assert first["manifest"]["identity"]["section"]["pin"] == old
    assert first["manifest"]["counts"] == {"rows": 4, "conversations": 4, "rejected": {}}
    assert len(narrowed["rows"]) == 4
    assert all(json.loads(text).keys() == {"messages", "kwargs"} for text in narrowed["rows"])
    assert [json.loads(text) for text in of_lines["rows"]] == [{"messages": one["messages"]} for one in ROWS]
    wanted = [path for path in fetched if "parquet" in path]
    assert wanted, "nothing was fetched"
    assert all(f"{old}/SFT/b_think-" in path for path in wanted)

    assert moved["manifest"]["identity"]["section"]["pin"] == new != old
    assert moved["ref"] != first["ref"]
    assert all('"answer":"new SFT' in text for text in moved["rows"])
    assert by_commit["ref"] != first["ref"]
    assert by_commit["rows"] == first["rows"]

    messages = [
        ("Unresolved", "dataset org/none: the hub knows no such dataset", "for local files use path"),
        ("Unresolved", "dataset org/chat: has no revision 'v9'"),
        ("ValueError", "org/chat (config SFT): no split 'c_think'; it has a_no_think, b_think"),
        ("ValueError", "none", "SFT", "Mid"),
        ("ValueError", "org/chat (config SFT, split b_think)", "message"),
    ]
    for found, (kind, *words) in zip(failed, messages, strict=True):
        assert found["error"] == kind
        assert all(word in found["message"] for word in words), found


def test_parquet_nulls_of_other_rows_keys_are_not_arguments(tmp_path: Path) -> None:
    call = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "a"}]}]
    other = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "b", "arguments": {"x": 1}}]},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": call}, {"messages": other}]), tmp_path / "a.parquet")
    rows = [row for _, row in read_files([tmp_path / "a.parquet"], None)]
    assert rows[0]["messages"] == call
    assert rows[1]["messages"] == other


def test_files_named_twice_and_brackets_in_names(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b[1].jsonl"):
        (tmp_path / name).write_text("{}\n")
    both = [str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl"), str(tmp_path / "b[1].jsonl")]
    assert [path.name for path in list_files(both)] == ["a.jsonl", "b[1].jsonl"]
