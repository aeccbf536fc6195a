"""lm-eval's index of tasks, groups and tags, and the folders of lm-eval that a name needs.

lm-eval reads 14,000 YAML files into its index, so a step that scores one task reads only that task's folders. Only the
whole index tells these folders, for any file may hold members of a group or tasks of a tag. The whole index is built
once for each state of lm-eval's files, and its names and folders are cached.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sft_core.store.folders import cache_folder

log = logging.getLogger(__name__)
KEY = "evaluation.lm_eval"


class Known(NamedTuple):
    """A name in lm-eval's index."""

    folder: str | None  # of its YAML, below `built_in()`; None for a tag, which has no file
    members: list[str]  # names in a group, tasks of a tag


class Entry(Protocol):
    """An entry of lm-eval's index. A tag has no cfg and no yaml_path; its tags are its tasks."""

    cfg: Mapping[str, Any] | None
    tags: set[str]
    yaml_path: Path | None


def built_in() -> Path:
    """The folder of lm-eval's own tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def task_manager(include_path: str | None, folders: Sequence[str] | None) -> Any:
    """lm-eval's TaskManager. folders: the only ones of its own that it reads; None: all."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    from lm_eval.tasks import TaskManager

    # Of equal names in these paths lm-eval takes the later one, but among its own folders the first by path.
    paths = [str(built_in() / folder) for folder in sorted(folders or (), reverse=True)]
    paths += [checked(include_path)] if include_path else []
    return TaskManager(include_path=paths, include_defaults=folders is None)


def checked(include_path: str) -> str:
    """The folder as an absolute path. Raises FileNotFoundError."""
    folder = Path(include_path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{KEY}.include_path: found {include_path!r}; no such folder (looked in {Path.cwd()})")
    return str(folder.resolve())


def reached(name: str, members_of: Callable[[str], Iterable[str]]) -> set[str]:
    """The name, and all names below it by groups and tags."""
    names, waiting = set(), [name]
    while waiting:
        if (name := waiting.pop()) not in names:
            names.add(name)
            waiting.extend(members_of(name))
    return names


def members_in(index: Mapping[str, Entry]) -> Callable[[str], Iterable[str]]:
    """A function that gives a name's members by an index of lm-eval; none for a name that is not in it."""

    def members_of(name: str) -> Iterable[str]:
        if (entry := index.get(name)) is None:
            return ()
        return sorted(entry.tags) if entry.cfg is None else _named_in(entry.cfg)

    return members_of


class Member(NamedTuple):
    """A member of a group."""

    name: str | None  # None for a group that is written out inside another
    config: Mapping[str, Any]  # as the group's YAML writes it; empty where it only names the member


def members(config: Mapping[str, Any]) -> list[Member]:
    """The members of a group. config: the group's."""
    stated = config.get("task")
    return [
        Member(member, {})
        if isinstance(member, str)
        else Member(member["group"] if "group" in member else member.get("task"), member)
        for member in (stated if isinstance(stated, list) else [])
    ]


def _named_in(config: Mapping[str, Any]) -> Iterator[str]:
    """All names in a group's config, at any depth."""
    for name, inner in members(config):
        if isinstance(name, str):
            yield name
        yield from _named_in(inner)


def folders_of(name: str, users: Mapping[str, Entry], known: Mapping[str, Known]) -> list[str]:
    """The folders of lm-eval to read for a name, none of them inside another.

    users: the index of the user's folder. Its tasks replace lm-eval's of the same names.
    """
    users_members, folders = members_in(users), set()

    def members_of(name: str) -> Iterable[str]:
        return users_members(name) if name in users else known[name].members if name in known else ()

    for below in reached(name, members_of):
        if below in users or below not in known:
            continue
        if (folder := known[below].folder) is not None:
            folders.add(Path(folder))
        else:
            # One folder around all tasks of the tag: of several folders with a tag lm-eval knows the last one's tasks.
            folders.add(Path(os.path.commonpath([known[task].folder or "." for task in known[below].members])))
    return sorted(str(folder) for folder in folders if not folders.intersection(folder.parents))


def known_names() -> dict[str, Known]:
    """All tasks, groups and tags of lm-eval.

    Building the index takes 10 s of CPU (23 to 32 s on a busy machine). Reading the cached one takes 0.4 s, mostly for
    the check that the files are the same (14,000 YAMLs, lm-eval 0.4.13). Searching the files' text without a cache
    takes 1.7 s for most names, but names with a tag below them, such as mmlu, need the whole index each time.
    """
    path = cache_folder() / f"lm_eval-{importlib.metadata.version('lm_eval')}-{_state(built_in())}.json"
    try:
        return {name: Known(*fields) for name, fields in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # missing or damaged
        pass
    log.info("indexing lm-eval's tasks: half a minute, once for each version of lm-eval")
    index = task_manager(None, None).task_index
    members_of = members_in(index)
    names = {name: Known(_folder(entry.yaml_path), [*members_of(name)]) for name, entry in index.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}")
        unfinished.write_text(json.dumps(names), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        log.warning("lm-eval's index cannot be cached (%s); set SFT_CACHE to a folder that can be written", error)
    return names


def _folder(yaml_path: Path | None) -> str | None:
    return None if yaml_path is None else str(yaml_path.parent.relative_to(built_in()))


def _state(root: Path) -> str:
    """A digest of names, sizes and times of all files below a folder."""
    files, folders = [], [str(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name == "__pycache__":  # the first import writes it
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    stat = entry.stat()
                    files.append((entry.path, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()[:16]
