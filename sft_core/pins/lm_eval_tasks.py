"""Pins of lm-eval tasks: digests of their configs, of the code beside them, and of the local data that they read.

Nothing is downloaded and torch is not imported. The version stands for lm-eval's own code. For a dataset of the hub
stands what the config says of it: its name and, where it is stated, its revision.
"""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_core.local_files import digest_files
from sft_core.pins.lm_eval_index import (
    KEY,
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

_FILE_READERS = ("arrow", "csv", "json", "parquet", "text")  # dataset_path where the data are files, not the hub's


def pin_tasks(names: Sequence[str], include_path: str | None, num_fewshot: int | None) -> dict[str, Any]:
    """{version, tasks: {name: {digest, folders}}}: plain data. folders: those of lm-eval that have to be read for it.

    Raises ValueError for a name that lm-eval does not know, for a task that cannot be run as the recipe asks, and
    when lm-eval is not installed; FileNotFoundError for a missing folder or data file.
    """
    version = installed_version()
    own = task_manager(include_path, []).task_index
    leads_out = any(one not in own for name in names for one in reached(name, members_in(own)))
    known = known_names() if leads_out else {}
    tasks = {}
    for name in names:
        _check_known(name, {*own, *known})
        folders = folders_of(name, own, known)
        index = task_manager(include_path, folders).task_index if folders else own
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


def _entries(name: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """The index's entries of the name and of all names that it leads to, by name.

    A task that is written out inside its group is in no index: the group's config holds it as a whole.
    """
    return {one: index[one] for one in sorted(reached(name, members_in(index))) if one in index}


def _check_runs(name: str, entries: Mapping[str, Any], num_fewshot: int | None) -> None:
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


def _digest(entries: Mapping[str, Any], include_path: str | None) -> str:
    roots = [str(built_in()), *([checked(include_path)] if include_path else [])]
    configs = {name: entry.cfg or sorted(entry.tags) for name, entry in entries.items()}
    text = json.dumps({"configs": configs, "code": _code(entries, include_path), "data": _data(entries)}, default=str)
    for root in roots:
        text = text.replace(root, "")  # configs name functions, and may name data, by path: a moved folder is the same
    return sha256_of(json.loads(text))


def _code(entries: Mapping[str, Any], include_path: str | None) -> str | None:
    """The digest of all Python files below `include_path` where a task is from there. Imports are not followed."""
    if include_path is None:
        return None
    folder = Path(checked(include_path))
    is_users = any(entry.yaml_path and entry.yaml_path.is_relative_to(folder) for entry in entries.values())
    return digest_files(sorted(folder.rglob("*.py"))) if is_users else None


def _data(entries: Mapping[str, Any]) -> dict[str, str]:
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
    elif path is None:  # a group that sets its tasks' data; the tasks' configs say whether they are files
        yield from (pattern for pattern in patterns if glob.glob(os.path.expanduser(pattern), recursive=True))
    for _, inner in members(config):
        yield from _data_patterns(inner)


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
