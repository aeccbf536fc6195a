"""Pins of lm-eval tasks: digests of their configs, of the code beside them, and of the local data that they read.

Nothing is downloaded and torch is not imported. lm-eval's version pins its own code. A dataset of the hub is pinned as
far as the config states its name and revision.
"""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from sft_core.local_files import digest_files
from sft_core.pins.lm_eval_index import (
    KEY,
    Entry,
    built_in,
    checked,
    folders_of,
    known_names,
    members,
    members_in,
    reached,
    task_manager,
)
from sft_core.recipe.wording import nearest
from sft_core.store.manifest import sha256_of

_FILE_READERS = ("arrow", "csv", "json", "parquet", "text")  # a dataset_path that means files, not the hub


class TaskPin(TypedDict):
    digest: str
    folders: list[str]  # of lm-eval, to read for the task


class LmEvalPins(TypedDict):
    version: str
    tasks: dict[str, TaskPin]


def pin_tasks(names: Sequence[str], include_path: str | None, num_fewshot: int | None) -> LmEvalPins:
    """The pins of the tasks, which are plain data.

    Raises ValueError for an unknown name, for a task that cannot run as the recipe asks, and for a missing lm-eval;
    FileNotFoundError for a missing folder or data file.
    """
    version = installed_version()
    users = task_manager(include_path, []).task_index
    needs_lm_eval = any(below not in users for name in names for below in reached(name, members_in(users)))
    known = known_names() if needs_lm_eval else {}
    tasks: dict[str, TaskPin] = {}
    for name in names:
        _check_known(name, {*users, *known})
        folders = folders_of(name, users, known)
        index = task_manager(include_path, folders).task_index if folders else users
        entries = _entries(name, index)
        _check_runs(name, entries, num_fewshot)
        tasks[name] = {"digest": _digest(entries, include_path), "folders": folders}
    return {"version": version, "tasks": tasks}


def installed_version() -> str:
    """Raises ValueError, which says what to install, when lm-eval is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"{KEY}: lm-eval is not installed; pip install 'sft-flow[eval]', or remove {KEY}") from None


def digest_task(name: str, include_path: str | None, folders: list[str]) -> str:
    """The digest of a pinned task as its files are now."""
    installed_version()
    index = task_manager(include_path, folders).task_index
    _check_known(name, index)
    return _digest(_entries(name, index), include_path)


def _check_known(name: str, known: Collection[str]) -> None:
    if name not in known:
        hint = nearest(name, known, otherwise="; `lm-eval ls tasks` lists them")
        raise ValueError(f"{KEY}.tasks: found {name!r}; lm-eval knows no such task{hint}")


def _entries(name: str, index: Mapping[str, Entry]) -> dict[str, Entry]:
    """The index's entries of the name and of all names below it.

    A task that is written out inside its group is in no index: the group's config holds all of it.
    """
    return {below: index[below] for below in sorted(reached(name, members_in(index))) if below in index}


def _check_runs(name: str, entries: Mapping[str, Entry], num_fewshot: int | None) -> None:
    for task, entry in entries.items():
        config = entry.cfg or {}
        if config.get("unsafe_code"):
            raise ValueError(
                f"{KEY}.tasks: {task} runs code that the model writes, which is not done here; remove {name}"
            )
        if num_fewshot and config.get("num_fewshot") == 0:
            raise ValueError(
                f"{KEY}.num_fewshot: found {num_fewshot}; the config of {task} fixes it at 0, and lm-eval would "
                "leave it there. Remove num_fewshot or the task"
            )


def _digest(entries: Mapping[str, Entry], include_path: str | None) -> str:
    roots = [str(built_in()), *([checked(include_path)] if include_path else [])]
    configs = {name: entry.cfg or sorted(entry.tags) for name, entry in entries.items()}
    text = json.dumps({"configs": configs, "code": _code(entries, include_path), "data": _data(entries)}, default=str)
    for root in roots:
        text = text.replace(root, "")  # configs hold paths of functions and data: moving a folder changes no digest
    return sha256_of(json.loads(text))


def _code(entries: Mapping[str, Entry], include_path: str | None) -> str | None:
    """The digest of all Python files below `include_path`, if a task is from there. Imports are not followed."""
    if include_path is None:
        return None
    folder = Path(checked(include_path))
    is_users = any(entry.yaml_path and entry.yaml_path.is_relative_to(folder) for entry in entries.values())
    return digest_files(sorted(folder.rglob("*.py"))) if is_users else None


def _data(entries: Mapping[str, Entry]) -> dict[str, str]:
    """{pattern: digest} of the local files that the configs name."""
    patterns = sorted({pattern for entry in entries.values() for pattern in _data_patterns(entry.cfg or {})})
    return {pattern: digest_files(_local_files(pattern)) for pattern in patterns}


def _data_patterns(config: Mapping[str, Any]) -> Iterator[str]:
    path, arguments = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    stated = _strings(arguments.get("data_dir") or arguments.get("data_files"))
    patterns = [pattern for pattern in stated if "://" not in pattern]
    if isinstance(path, str) and Path(path).exists():
        yield path
    elif path in _FILE_READERS:
        yield from patterns
    elif path is None:  # a group that sets its tasks' data; only the tasks' configs say whether the data are files
        yield from (pattern for pattern in patterns if glob.glob(os.path.expanduser(pattern), recursive=True))
    for member in members(config):
        yield from _data_patterns(member.config)


def _strings(value: Any) -> Iterator[str]:
    """The strings in a string, a list or a dict's values, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _local_files(pattern: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    paths = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(path for path in paths if path.is_file())
    if not files:
        raise FileNotFoundError(f"{KEY}: a task reads {pattern}; no such file (looked in {Path.cwd()})")
    return files
