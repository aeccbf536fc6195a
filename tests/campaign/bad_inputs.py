"""Recipes and files that are wrong: each gets an error that names its key or its file, and no traceback."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaign.pipeline import QUICKSTART, recipe

PLAN, START, BUILD, COUNTED = "by sft plan", "by start", "by the step that reads it", "counted as rejected rows"
SILENT, CRASHED, UNNAMED = "silent", "a traceback", "without its name"


class Mistake(NamedTuple):
    """named: what a message has to hold. make: turns a good recipe and an empty folder into a bad one."""

    name: str
    named: str
    make: Callable[[dict[str, Any], Path], None]


class Answer(NamedTuple):
    mistake: str
    outcome: str
    message: str


def bad_inputs(seed: int, number: int, folder: Path) -> Iterator[Answer]:
    """All mistakes in files, and as many of those in keys as make up the number."""
    in_files, in_keys = mistakes_in_files(), mistakes_in_keys()
    rng = random.Random(seed)
    chosen = [*in_files, *rng.sample(in_keys, max(0, min(len(in_keys), number - len(in_files))))][:number]
    for mistake in chosen:
        yield answer_to(mistake, folder / "bad")


def answer_to(mistake: Mistake, folder: Path) -> Answer:
    from click.testing import CliRunner

    from sft_core.recipe.parse import parse_recipe
    from sft_core.store.store import Store
    from steps.cli.main import main
    from steps.pack import PACKED
    from steps.start import prepare
    from steps.tokenize import TOKENS

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = recipe(str(folder / "store"))
    mistake.make(data, folder)
    path = folder / "recipe.yaml"
    if not path.exists():
        path.write_text(json.dumps(data))

    def answer(outcome: str, message: object) -> Answer:
        is_named = mistake.named.lower() in str(message).lower()
        return Answer(mistake.name, outcome if is_named or outcome in (SILENT, CRASHED) else UNNAMED, str(message))

    planned = CliRunner().invoke(main, ["plan", str(path)])
    if planned.exit_code:
        is_error = isinstance(planned.exception, SystemExit) and "Traceback" not in planned.output
        return answer(PLAN if is_error else CRASHED, planned.output if is_error else repr(planned.exception))
    where, store = START, Store(folder / "store")
    try:
        pinned = prepare(parse_recipe(data))
        where = BUILD
        store.ensure(PACKED, pinned)
    except (ValueError, OSError) as error:
        return answer(where, error)
    except Exception as error:
        return answer(CRASHED, repr(error))
    for source in pinned.recipe.sources:
        counts = store.manifest(store.ensure(TOKENS, pinned, source=source))["counts"]["source"]
        if rejected := {reason: n for reasons in counts["rejected"].values() for reason, n in reasons.items()}:
            return answer(COUNTED, rejected)
    return answer(SILENT, "")


# Mistakes in keys


def mistakes_in_keys() -> list[Mistake]:
    """Each key of a recipe with values of another kind, and each key with a letter missing."""
    from sft_core.recipe.parse import parse_recipe

    written = parse_recipe(recipe("store")).as_written()
    mistakes = []
    for path, value in _leaves(written):
        if (
            path[0] in ("hub", "name")
            or path[-1] == "tokens_per_forward"
            or "config" in path
            or "kwargs" in path
            or "extra" in path
            or "_by_task" in path[-1]
        ):
            continue  # they hold any JSON
        key = ".".join(map(str, path))
        for wrong in _of_other_kinds(value):
            mistakes.append(Mistake(f"{key}: {wrong!r}", str(path[-1]), _setting(path, wrong)))
        if len(str(path[-1])) > 3 and isinstance(path[-1], str):
            mistyped = path[-1][:-2] + path[-1][-1]
            mistakes.append(Mistake(f"{key} as {mistyped}", mistyped, _setting([*path[:-1], mistyped], value)))
    return mistakes


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[list[Any], Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        yield from _leaves(value[0], (*path, 0))
    elif value is not None:
        yield list(path), value


def _of_other_kinds(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return ["maybe", 2.5, []]
    if isinstance(value, int | float):
        return ["many", [1], {"a": 1}, -7, float("nan"), True]
    if isinstance(value, str):
        return [{"a": 1}, 3, True]
    return [3, "a"]


def _setting(path: list[Any], value: Any) -> Callable[[dict[str, Any], Path], None]:
    def make(data: dict[str, Any], folder: Path) -> None:
        inner: Any = data
        for key in path[:-1]:
            if isinstance(inner, dict):
                inner = inner.setdefault(key, {})
                inner = inner if inner is not None else {}
            else:
                inner = inner[key]
        inner[path[-1]] = value

    return make


# Mistakes in files


def mistakes_in_files() -> list[Mistake]:
    good = [json.loads(line) for line in (QUICKSTART / "copy_no_think.jsonl").read_text().splitlines()[:60]]
    lines = "\n".join(map(json.dumps, good))

    def source(name: str, content: bytes | str | None, file: str = "data.jsonl", named: str | None = None) -> Mistake:
        def make(data: dict[str, Any], folder: Path) -> None:
            if content is not None:
                (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
            data["dataset_mixture"]["datasets"][0] = {"name": "broken", "path": str(folder / file)}

        return Mistake(name, named or Path(file).name, make)

    def rows(name: str, change: Callable[[dict[str, Any]], Any], named: str, every: int = 1) -> Mistake:
        changed = [change(copy.deepcopy(row)) if number % every == 0 else row for number, row in enumerate(good)]
        return source(name, "\n".join(one if isinstance(one, str) else json.dumps(one) for one in changed), named=named)

    def tokenizer(name: str, spoil: Callable[[Path], None], named: str = "tokenizer") -> Mistake:
        def make(data: dict[str, Any], folder: Path) -> None:
            copied = folder / "tokenizer"
            shutil.copytree(QUICKSTART / "tokenizer", copied)
            spoil(copied)
            data["model"]["tokenizer_name_or_path"] = str(copied)

        return Mistake(name, named, make)

    def template(name: str, text: str | None, named: str = "template") -> Mistake:
        def make(data: dict[str, Any], folder: Path) -> None:
            if text is not None:
                (folder / "template.jinja").write_text(text)
            data["chat_template"] = {"template": str(folder / "template.jinja")}

        return Mistake(name, named, make)

    def text(name: str, content: str, named: str = "recipe.yaml") -> Mistake:
        return Mistake(name, named, lambda data, folder: (folder / "recipe.yaml").write_text(content) and None)

    def weights(name: str, content: bytes | None) -> Mistake:
        def make(data: dict[str, Any], folder: Path) -> None:
            (folder / "model").mkdir()
            (folder / "model" / "config.json").write_text(
                json.dumps({**data["model"]["config"], "architectures": ["LlamaForCausalLM"]})
            )
            if content is not None:
                (folder / "model" / "model.safetensors").write_bytes(content)
            data["model"] = {**data["model"], "config": None, "model_name_or_path": str(folder / "model")}

        return Mistake(name, "model", make)

    def turn(row: dict[str, Any], **keys: Any) -> dict[str, Any]:
        row["messages"][-1] |= keys
        return row

    return [
        source("a source that is not there", None, "nowhere.jsonl"),
        source("an empty source", ""),
        source("a source of spaces", " \n \n"),
        source("a source that is a picture", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4),
        source("a source of one broken line", "{"),
        source("a Parquet file that is cut short", b"PAR1" + bytes(100), "data.parquet"),
        source("a Parquet file that is JSON", lines, "data.parquet"),
        source("JSON lines that are Parquet by name", lines, "data.parquet"),
        source("a table of commas", "prompt,answer\na,b\n", "data.csv"),
        source("a file without an ending", lines, "data"),
        source("one JSON array of nothing", "[]", "data.json"),
        source("UTF-16", lines.encode("utf-16")),
        source("rows that are numbers", "1\n2\n3\n"),
        source("rows that are null", "null\n" * 9),
        source("rows with other columns", '{"question": "a", "reply": "b"}\n' * 9),
        rows("no messages", lambda row: {"messages": []}, "messages"),
        rows("messages that are text", lambda row: {"messages": "user: a"}, "messages"),
        rows("a role that nobody knows", lambda row: turn(row, role="wizard"), "role"),
        rows("an answer that is null", lambda row: turn(row, content=None), "messages"),
        rows("an answer that is a number", lambda row: turn(row, content=3), "messages"),
        rows("a turn without a role", lambda row: {"messages": [{"content": "a"}]}, "role"),
        rows("only a user turn", lambda row: {"messages": row["messages"][:1]}, "assistant"),
        rows("a broken line in ten", lambda row: "{broken", "json", every=10),
        rows(
            "a lone surrogate in ten",
            lambda row: '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "",
            every=10,
        ),
        tokenizer("a tokenizer that is cut short", lambda folder: _cut(folder / "tokenizer.json")),
        tokenizer("a tokenizer folder without its file", lambda folder: (folder / "tokenizer.json").unlink()),
        tokenizer("a tokenizer that is a list", lambda folder: (folder / "tokenizer.json").write_text("[]") and None),
        template("a template that is not there", None),
        template("a template with an open block", "{% for message in messages %}"),
        template("a template that raises", "{{ raise_exception('no') }}"),
        template("a template that says nothing", "nothing"),
        template(
            "a template that drops answers",
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        ),
        template("a template with an unknown filter", "{% for m in messages %}{{ m.content | shout }}{% endfor %}"),
        text("a recipe that is no YAML", "name: [a\n  b: }"),
        text("an empty recipe", ""),
        text("a recipe that is a list", "- a\n- b\n"),
        text("a recipe of tabs", "name: a\n\tmodel: b\n"),
        text("a recipe with a key twice", "name: a\nname: b\n", "name"),
        weights("a model without weights", None),
        weights("weights that are cut short", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"),
        weights("weights that are text", b"version https://git-lfs.github.com/spec/v1\n"),
        Mistake("a model folder without a config", "config.json", _model_without_config),
        Mistake("a store below a file", "store", _store_below_a_file),
        Mistake("two sources of one name", "name", _twice),
        Mistake("a task that is no source", "tasks", _setting(["evaluation", "tasks"], ["nobody"])),
        Mistake(
            "a folder as a source",
            "folder",
            lambda data, folder: _setting(["dataset_mixture", "datasets", 0, "path"], str(folder))(data, folder),
        ),
    ]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _model_without_config(data: dict[str, Any], folder: Path) -> None:
    (folder / "model").mkdir()
    data["model"] = {**data["model"], "config": None, "model_name_or_path": str(folder / "model")}


def _store_below_a_file(data: dict[str, Any], folder: Path) -> None:
    (folder / "file").write_text("")
    data["runtime"]["store"] = str(folder / "file" / "store")


def _twice(data: dict[str, Any], folder: Path) -> None:
    datasets = data["dataset_mixture"]["datasets"]
    datasets[1] = dict(datasets[0])


def as_row(found: list[Answer]) -> tuple[str, str, str]:
    outcomes = Counter(answer.outcome for answer in found)
    return (
        f"{len(found)} bad inputs",
        "each is told with its key or file, without a traceback; none is silent",
        "; ".join(f"{outcomes[kind]} {kind}" for kind in (PLAN, START, BUILD, COUNTED, SILENT, CRASHED, UNNAMED)),
    )


def is_kept(found: list[Answer]) -> bool:
    return all(answer.outcome not in (SILENT, CRASHED, UNNAMED) for answer in found)
