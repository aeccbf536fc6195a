"""JSON files: lines, or one list; either whole and in order, in constant memory, or refused with the place."""

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_core.data.sources.formats import json_files
from sft_core.data.sources.formats.json_files import read_json
from sft_core.data.sources.rejects import Rejected
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[4]
ROWS = [{"text": f"é🙂 {number}", "n": [number, -1.5e3]} for number in range(5)]


def read(path: Path, columns: list[str] | None = None) -> list[Any]:
    return [row for _, row in read_json(path, columns)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("a.json", lambda content: content),
        ("a.json", lambda content: b"\xef\xbb\xbf \r\n" + content + b"\r\n "),
        ("a.json.gz", gzip.compress),
        ("a.json.zst", zstandard.compress),
    ],
    ids=["plain", "bom and spaces", "gz", "zst"],
)
def test_list_in_a_json_file_is_read_as_its_rows(
    tmp_path: Path, name: str, encode: Callable[[bytes], bytes], indent: int | None
):
    (tmp_path / name).write_bytes(encode(json.dumps(ROWS, ensure_ascii=False, indent=indent).encode()))
    assert read(tmp_path / name) == ROWS
    assert [where for where, _ in read_json(tmp_path / name, None)] == [f"{name}: element {n}" for n in range(5)]
    assert read(tmp_path / name, ["text", "none"]) == [{"text": row["text"]} for row in ROWS]


def test_list_in_a_jsonl_file_is_a_row_and_lines_in_a_json_file_are_rows(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("[1, 2]\n[3]\n")
    assert read(tmp_path / "a.jsonl") == [[1, 2], [3]]
    (tmp_path / "a.json").write_text('{"a": 1}\n{"b"\n\n"x"\n')
    first, broken, last = read(tmp_path / "a.json")
    assert (first, last) == ({"a": 1}, "x")
    assert isinstance(broken, Rejected) and broken.reason == "invalid_json"


def test_empty_list_has_no_rows(tmp_path: Path):
    (tmp_path / "a.json").write_text(" [ ]\n")
    assert read(tmp_path / "a.json") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}, {"a": }]', "element 1 is not valid JSON"),
        ('[{"a": 1}', "after element 0 comes ''; expected , or ]"),
        ('[{"a": 1} {"a": 2}]', "after element 0 comes '{'; expected , or ]"),
        ('[{"a": 1},]', "element 1 is not valid JSON"),
        ("[", "element 0 is not valid JSON"),
        ('[{"a": 1}]\n{"a": 2}\n', "after the list comes '{'; a .json file is one list, or JSON lines"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
    ],
)
def test_broken_list_is_one_error_that_says_where(tmp_path: Path, text: str | bytes, words: str):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as fault:
        read(tmp_path / "a.json")
    assert str(fault.value).startswith(f"{tmp_path / 'a.json'}: ") and words in str(fault.value)
    assert "mend the list, or write one row a line" in str(fault.value)


def test_broken_element_is_told_of_before_all_of_a_large_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_files, "_CHARS_A_READ", 16)
    monkeypatch.setattr(json_files, "_MAX_ELEMENT_CHARS", 1000)
    held: list[int] = []
    grow = json_files._Window._grow

    def watch(window: Any) -> bool:
        more = grow(window)
        held.append(len(window._text))
        return more

    monkeypatch.setattr(json_files._Window, "_grow", watch)
    (tmp_path / "a.json").write_text('[{"a": "never closed' + "x" * 100_000 + "]")
    with pytest.raises(ValueError, match="element 0 is not valid JSON"):
        read(tmp_path / "a.json")
    assert 1000 < max(held) < 4000


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(values, max_size=5),
    chars=st.integers(1, 40),
    separators=st.sampled_from([(",", ":"), (" ,\n", ": ")]),
    ascii=st.booleans(),
    cut=st.floats(0, 0.999),
)
def test_list_is_what_json_reads_at_any_window_and_a_cut_one_is_an_error(
    tmp_path: Path, rows: list[Any], chars: int, separators: tuple[str, str], ascii: bool, cut: float
):
    path = tmp_path / "a.json"
    text = json.dumps(rows, separators=separators, ensure_ascii=ascii)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_CHARS_A_READ", chars)
        try:
            path.write_text(text, encoding="utf-8")
        except UnicodeEncodeError:
            return  # a lone surrogate cannot be in a file
        assert read(path) == rows
        path.write_text(text[: max(1, int(len(text) * cut))], encoding="utf-8")
        with pytest.raises(ValueError, match=r"a\.json: (element \d+ is not|after element \d+ comes)"):
            read(path)


# Memory

GROWTH = """
    import json, resource, sys
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from sft_core.data.sources.files import read_files
    from sft_core.data.sources.hub import read_hub

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def read(rows):
        return sum(len(row["messages"][0]["content"]) for _, row in rows)

    result = {{}}
    for name, (small, large) in json.load(sys.stdin).items():
        open_rows = (lambda at: read_hub(*at)) if name == "hub" else (lambda at: read_files([Path(at)], None))
        read(open_rows(small))  # imports, pools, buffers
        before = peak()
        result[name] = (read(open_rows(large)), peak() - before)
    print(json.dumps(result))
"""
MIB = 2**20
TEXT_BYTES = 16 * 1024
NUM_SMALL = 2000  # rows that come first, for what is taken once: imports, pools, buffers
# Rows, and the growth allowed in MiB. datasets' reader takes 100 to 200 MiB ahead of who reads, and no more at 3 GiB.
LARGE = {
    "lines.jsonl.zst": (12_000, 48),
    "list.json.zst": (12_000, 48),
    "rows.parquet": (12_000, 48),
    "hub": (50_000, 256),
}


def write_rows(path: Path, num_rows: int) -> Path:
    row = {"messages": [{"role": "user", "content": "x" * TEXT_BYTES}, {"role": "assistant", "content": "y"}]}
    line = json.dumps(row)
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, pa.Table.from_pylist([row]).schema) as writer:
            for _ in range(num_rows // 500):
                writer.write_table(pa.Table.from_pylist([row]).take([0] * 500))
        return path
    with zstandard.open(path, "wt") as file:
        is_list = ".json." in path.name
        for number in range(num_rows):
            file.write(("," if number else "[") + line if is_list else line + "\n")
        file.write("]" if is_list else "")
    return path


@pytest.mark.slow
def test_reading_a_source_larger_than_the_allowed_growth_keeps_memory_flat(tmp_path: Path):
    job: dict[str, Any] = {}
    with HubServer() as server:
        for name, (num_large, allowed_mib) in LARGE.items():
            assert num_large * TEXT_BYTES > 2.5 * allowed_mib * MIB
            if name == "hub":
                files = [write_rows(tmp_path / f"{num}.parquet", num).read_bytes() for num in (NUM_SMALL, num_large)]
                commits = [server.publish("datasets", "org/rows", {"train.parquet": file}) for file in files]
                job[name] = [("org/rows", None, "train", commit, None) for commit in commits]
            else:
                job[name] = [str(write_rows(tmp_path / f"{num}-{name}", num)) for num in (NUM_SMALL, num_large)]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(GROWTH).format(root=str(ROOT))],
            env=server.environment(tmp_path),
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: num_chars for name, (num_chars, _) in found.items()} == {
        name: num_large * TEXT_BYTES for name, (num_large, _) in LARGE.items()
    }
    growth_mib = {name: round(growth / MIB) for name, (_, growth) in found.items()}
    assert all(growth_mib[name] < allowed for name, (_, allowed) in LARGE.items()), growth_mib
