"""What the names of lm-eval tasks stand for: their configs, the code beside them, and the local data that they read.

Nothing is downloaded and torch is not imported. lm-eval's own code is told by its version; a data set of the hub by
what the config says of it, which is its name and, where it is stated, its revision.
"""

from __future__ import annotations

import difflib
import glob
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_core.local_files import digest_files
from sft_core.store.manifest import sha256_of

KEY = "evaluation.lm_eval"
_FILE_READERS = ("arrow", "csv", "json", "parquet", "text")  # dataset_path where the data are files, not the hub's


def pin_tasks(names: Sequence[str], include_path: str | None, num_fewshot: int | None) -> dict[str, Any]:
    """{version, tasks: {name: {digest, folders}}}: plain data. folders: those of lm-eval that its YAMLs are in.

    Raises ValueError for a name that lm-eval does not know, for a task that cannot be run as the recipe asks, and
    where lm-eval is not installed; FileNotFoundError for a missing folder or data file.
    """
    version = installed_version()
    index = _index(names, include_path)
    tasks = {}
    for name in names:
        _check_known(name, index)
        entries = _entries(name, index)
        _check_runs(name, entries, num_fewshot)
        tasks[name] = {"digest": _digest(entries, include_path), "folders": _folders(entries)}
    return {"version": version, "tasks": tasks}


def installed_version() -> str:
    """Raises ValueError, saying what to install, where there is none."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"{KEY}: lm-eval is not installed; pip install 'sft-flow[eval]', or remove {KEY}") from None


def digest_task(name: str, include_path: str | None, folders: list[str]) -> str:
    """The digest of a pinned task as it is now."""
    installed_version()
    index = task_manager(include_path, folders).task_index
    _check_known(name, index)
    return _digest(_entries(name, index), include_path)


def task_manager(include_path: str | None, folders: list[str] | None) -> Any:
    """lm-eval's TaskManager. folders: the only ones of its own that are read; None: all."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    from lm_eval.tasks import TaskManager

    paths = [
        *(str(_built_in() / folder) for folder in folders or ()),
        *([_checked(include_path)] if include_path else []),
    ]
    return TaskManager(include_path=paths, include_defaults=folders is None)


def _index(names: Sequence[str], include_path: str | None) -> Mapping[str, Any]:
    """lm-eval's index, as far as the names lead. It has 14,000 files, and parses them in a quarter of a minute."""
    index = task_manager(include_path, []).task_index
    unread: dict[Path, bytes] | None = None
    folders: set[Path] = set()
    while missing := [name for name in _reached(names, index) if name not in index]:
        unread = {path: path.read_bytes() for path in _built_in().rglob("*.yaml")} if unread is None else unread
        called = re.compile(rb"^[ \t-]*(?:task|group):[ \t]*[\"']?(?:%s)[\"']?\s*$" % _any_of(missing), re.MULTILINE)
        found = {path.parent.relative_to(_built_in()) for path, text in unread.items() if called.search(text)}
        if found <= folders:
            break  # no file says more of them
        folders |= found
        outermost = [str(folder) for folder in sorted(folders) if not folders.intersection(folder.parents)]
        index = task_manager(include_path, outermost).task_index
    reached = [*_reached(names, index)]
    # A tag's tasks may take it over from a file elsewhere: then the names alone do not lead to all of them.
    if any(name not in index or index[name].cfg is None for name in reached):
        return task_manager(include_path, None).task_index
    return index


def _any_of(names: list[str]) -> bytes:
    return b"|".join(re.escape(name.encode()) for name in names)


def _built_in() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _checked(include_path: str) -> str:
    folder = Path(include_path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{KEY}.include_path: found {include_path!r}; no such folder (looked in {Path.cwd()})")
    return str(folder.resolve())


def _check_known(name: str, index: Mapping[str, Any]) -> None:
    if name not in index:
        close = difflib.get_close_matches(name, list(index), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`lm-eval ls tasks` lists them"
        raise ValueError(f"{KEY}.tasks: found {name!r}; lm-eval knows no such task; {hint}")


def _members(config: Mapping[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    """(name, what is said of it) of what a group's config holds; a group that is written out inside has no name."""
    members = config.get("task")
    found: list[tuple[str | None, dict[str, Any]]] = []
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            found.append((member, {}))
        else:
            found.append((member["group"] if "group" in member else member.get("task"), member))
    return found


def _reached(names: Sequence[str], index: Mapping[str, Any]) -> Iterator[str]:
    """The names, and those that groups and tags among them lead to."""
    waiting, seen = [*names], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        yield name
        entry = index.get(name)
        if entry is None:
            continue
        if entry.cfg is None:
            waiting.extend(entry.tags)
        else:
            waiting.extend(_named_in(entry.cfg))


def _named_in(config: Mapping[str, Any]) -> Iterator[str]:
    for name, said in _members(config):
        if isinstance(name, str):
            yield name
        yield from _named_in(said)


def _entries(name: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """The index's entries of the task, and of all that a group or a tag leads to, by name."""
    # A task that is written out inside its group stands in no index, and in the group's config as a whole.
    return {found: index[found] for found in sorted(_reached([name], index)) if found in index}


def _check_runs(name: str, entries: Mapping[str, Any], num_fewshot: int | None) -> None:
    for found, entry in entries.items():
        config = entry.cfg or {}
        if config.get("unsafe_code"):
            raise ValueError(
                f"{KEY}.tasks: {found} runs code that the model writes, which is not done here; remove {name}"
            )
        if num_fewshot and config.get("num_fewshot") == 0:
            raise ValueError(
                f"{KEY}.num_fewshot: found {num_fewshot}; the config of {found} fixes it at 0, and lm-eval would "
                "leave it there. Remove num_fewshot or the task"
            )


def _digest(entries: Mapping[str, Any], include_path: str | None) -> str:
    roots = [str(_built_in()), *([_checked(include_path)] if include_path else [])]
    configs = {name: entry.cfg or sorted(entry.tags) for name, entry in entries.items()}
    told = json.dumps({"configs": configs, "code": _code(entries, include_path), "data": _data(entries)}, default=str)
    for root in roots:
        told = told.replace(root, "")  # functions stand there by path, and data may: a moved folder changes nothing
    return sha256_of(json.loads(told))


def _code(entries: Mapping[str, Any], include_path: str | None) -> str | None:
    """All Python below `include_path`, if any of it can be reached: what imports what is not followed."""
    if include_path is None:
        return None
    folder = Path(_checked(include_path))
    ours = any(entry.yaml_path and entry.yaml_path.is_relative_to(folder) for entry in entries.values())
    return digest_files(sorted(folder.rglob("*.py"))) if ours else None


def _data(entries: Mapping[str, Any]) -> dict[str, str]:
    """{pattern: digest} of the local files that the configs name."""
    patterns = sorted({pattern for entry in entries.values() for pattern in _data_patterns(entry.cfg or {})})
    return {pattern: digest_files(_local_files(pattern)) for pattern in patterns}


def _data_patterns(config: Mapping[str, Any]) -> Iterator[str]:
    path, given = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    named = [one for one in _strings(given.get("data_dir") or given.get("data_files")) if "://" not in one]
    if isinstance(path, str) and Path(path).exists():
        yield path
    elif path in _FILE_READERS:
        yield from named
    elif path is None:  # a group that sets its tasks' data; whether they are files, the tasks' configs say
        yield from (one for one in named if glob.glob(os.path.expanduser(one), recursive=True))
    for _, said in _members(config):
        yield from _data_patterns(said)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def _local_files(pattern: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(one for one in found if one.is_file())
    if not files:
        raise FileNotFoundError(f"{KEY}: a task reads {pattern}; no such file (looked in {Path.cwd()})")
    return files


def _folders(entries: Mapping[str, Any]) -> list[str]:
    """The folders of lm-eval that hold the entries' YAMLs, below its own."""
    root = _built_in()
    paths = [entry.yaml_path for entry in entries.values() if entry.yaml_path]
    return sorted({str(path.parent.relative_to(root)) for path in paths if path.is_relative_to(root)})
