"""lm-eval's index of tasks, groups and tags, and the folders of lm-eval that a name leads to.

lm-eval reads 14,000 YAML files into its index, so a step that scores one task reads that task's folders only. Which
folders those are is known from the whole index alone: members of groups and tasks of tags stand in any file. The whole
index is made once for each state of lm-eval's files, and its names and folders are cached.
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
from typing import Any, NamedTuple

from sft_core.store.folders import cache_folder

log = logging.getLogger(__name__)
KEY = "evaluation.lm_eval"


class Known(NamedTuple):
    """A name in lm-eval's index."""

    folder: str | None  # of its YAML, below `built_in()`; None for a tag, which has no file
    members: list[str]  # names in a group, tasks of a tag


def built_in() -> Path:
    """The folder of lm-eval's own tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def task_manager(include_path: str | None, folders: Sequence[str] | None) -> Any:
    """lm-eval's TaskManager. folders: the only ones of its own that it reads; None: all."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    from lm_eval.tasks import TaskManager

    # lm-eval takes a name that stands in two of these paths from the later one, and of its own from the first by path.
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
    """The name, and all names that it leads to by groups and tags."""
    names, waiting = set(), [name]
    while waiting:
        if (name := waiting.pop()) not in names:
            names.add(name)
            waiting.extend(members_of(name))
    return names


def members_in(index: Mapping[str, Any]) -> Callable[[str], Iterable[str]]:
    """The members of a name by one of lm-eval's indexes; none for a name that is not in it."""

    def members_of(name: str) -> Iterable[str]:
        if (entry := index.get(name)) is None:
            return ()
        return sorted(entry.tags) if entry.cfg is None else _named_in(entry.cfg)

    return members_of


def members(config: Mapping[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    """(name, config) of each member of a group. A group that is written out inside another has no name."""
    found: list[tuple[str | None, dict[str, Any]]] = []
    stated = config.get("task")
    for member in stated if isinstance(stated, list) else []:
        if isinstance(member, str):
            found.append((member, {}))
        else:
            found.append((member["group"] if "group" in member else member.get("task"), member))
    return found


def _named_in(config: Mapping[str, Any]) -> Iterator[str]:
    for name, inner in members(config):
        if isinstance(name, str):
            yield name
        yield from _named_in(inner)


def folders_of(name: str, own: Mapping[str, Any], known: Mapping[str, Known]) -> list[str]:
    """The folders of lm-eval to read for a name, none of them inside another one.

    own: the index of the user's folder, whose tasks replace lm-eval's of the same names.
    """
    own_members, folders = members_in(own), set()

    def members_of(name: str) -> Iterable[str]:
        return own_members(name) if name in own else known[name].members if name in known else ()

    for one in reached(name, members_of):
        if one in own or one not in known:
            continue
        if (folder := known[one].folder) is not None:
            folders.add(Path(folder))
        else:
            # One folder around all of a tag's tasks: lm-eval knows only those of the last folder that has the tag.
            folders.add(Path(os.path.commonpath([known[task].folder or "." for task in known[one].members])))
    return sorted(str(folder) for folder in folders if not folders.intersection(folder.parents))


def known_names() -> dict[str, Known]:
    """All tasks, groups and tags of lm-eval.

    To make the index takes 10 s of CPU (23 to 32 s on a busy machine), to read the cached one 0.4 s, most of it to see
    that the files are the same (14,000 YAMLs, lm-eval 0.4.13). Without a cache a search for names in the files' text
    finds most folders in 1.7 s, but has to make the whole index each time for a name that leads to a tag, as mmlu.
    """
    path = cache_folder() / f"lm_eval-{importlib.metadata.version('lm_eval')}-{_state(built_in())}.json"
    try:
        return {name: Known(*known) for name, known in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # not there yet, or damaged
        pass
    log.info("lm-eval's tasks are indexed: half a minute, once for each version of lm-eval")
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
