"""A conversation with a checkpoint in the terminal, or by piped lines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sft_core.evaluate.chat import Answer, Chat, Checkpoint, Sampling
from sft_core.pins.pinned import HubUnreachable, resolve
from sft_core.store.manifest import MANIFEST
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cli.lineage import trace
from steps.cli.say import say
from steps.runs.recorded import is_run, recorded
from steps.train import MODEL

HELP = (
    "/think and /no_think switch thinking, /system TEXT sets the system message (without TEXT: none), "
    "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"
)
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
_COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?\Z", re.DOTALL)
_WITH_MODEL = ("trained", "checkpoint", "delivered", "release")  # delivered: of older runs' searches


class Place(NamedTuple):
    """Where a checkpoint is, and the template variables that it was trained with."""

    path: str
    kwargs: dict[str, Any]
    revision: str | None = None


def find_checkpoint(name: str, root: str) -> Place:
    """name: a folder, a run, an output of the store (stage/key), or a hub id. Raises ValueError or OSError."""
    if Path(name).expanduser().is_dir():
        return _in_folder(Path(name).expanduser())
    if is_run(name):
        run = recorded(name)
        address = run.outputs.get("released") or run.outputs.get("delivered") or run.outputs.get("trained")
        if address is None:
            raise ValueError(f"run {run.id} has no checkpoint yet; wait for its training, or name another run")
        return _in_store(Store(run.recipe.runtime.store), Ref(*address.split("/")))
    stage = name.partition("/")[0]
    if stage in _stages(root):
        store = Store(root)
        return _in_store(store, store.find(name))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"found {name!r}; no such folder (looked in {Path.cwd()})")
    return _on_hub(name)


def _on_hub(id: str) -> Place:
    """The model at its main branch's present commit; if the hub is out of reach, the commit loaded last."""
    try:
        return Place(id, {}, resolve("model", id, "main").commit)
    except HubUnreachable:
        if (folder := _in_cache(id)) is None:
            raise
        return Place(str(folder), {})


def _in_cache(id: str) -> Path | None:
    """The folder of the commit loaded last, or None. Look at times: the cache knows no branch of a pinned commit."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = [repo for repo in scan_cache_dir().repos if (repo.repo_type, repo.repo_id) == ("model", id)]
    except CacheNotFound:
        return None
    revisions = (revision for repo in repos for revision in repo.revisions)
    folders = [revision.snapshot_path for revision in sorted(revisions, key=lambda revision: revision.last_modified)]
    models = [folder for folder in folders if (folder / "config.json").is_file()]
    return models[-1] if models else None


def _stages(root: str) -> set[str]:
    from steps.plan import ORDER

    return {*ORDER, *(path.name for path in Path(root).expanduser().glob("[!.]*") if path.is_dir())}


def _in_folder(folder: Path) -> Place:
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"  # an output's own folder
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds an adapter alone; name the folder of the merged model, {folder.parent}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is no model; name a folder of save_pretrained")
    output = folder.resolve().parent
    ref, store = Ref(output.parent.name, output.name), Store(output.parent.parent)
    if folder.name != "model" or not _is_output(store, ref):
        return Place(str(folder), {})
    return _in_store(store, ref)


def _is_output(store: Store, ref: Ref) -> bool:
    """Whether the folder is an output in its place, and not a copy of one."""
    try:
        manifest = json.loads((store.root / ref.stage / ref.key / MANIFEST).read_text(encoding="utf-8"))
        return manifest["ref"] == list(ref)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _in_store(store: Store, ref: Ref) -> Place:
    if ref.stage not in _WITH_MODEL:
        raise ValueError(f"{ref} holds no model; a checkpoint is an output of {', '.join(_WITH_MODEL)}")
    return Place(str(store.path(ref, *MODEL) / "model"), _template_kwargs(store, ref))


def _template_kwargs(store: Store, ref: Ref) -> dict[str, Any]:
    """The chat_template.kwargs with which the checkpoint's training rows were rendered."""
    for source, manifest in trace(store, ref).manifests.items():
        if manifest is not None and source.stage in ("tokens", "rendered"):
            return dict(manifest["identity"]["section"]["template"]["kwargs"])
    return {}


def talk(
    name: str,
    root: str,
    *,
    sampling: Sampling,
    system: str | None,
    thinking: bool | None,
    prompt: str | None,
    kwargs: dict[str, Any],
    trust_remote_code: bool,
) -> int:
    """Holds the conversation and returns the exit code.

    prompt: the only turn. Without it, turns come from the terminal, or from piped lines.
    """
    place = find_checkpoint(name, root)
    checkpoint = Checkpoint.load(
        place.path,
        revision=place.revision,
        kwargs={**place.kwargs, **kwargs},
        trust_remote_code=trust_remote_code,
    )
    chat = Chat(checkpoint, sampling, system=system, thinking=thinking)
    if prompt is not None:
        return _plain(chat, [prompt], commands=False)
    if not sys.stdin.isatty():
        return _plain(chat, (line.rstrip("\n") for line in sys.stdin), commands=True)
    say(f"{place.path}\n{HELP}\n", dim=True)
    _in_terminal(chat)
    return 0


def _plain(chat: Chat, turns: Iterable[str], *, commands: bool) -> int:
    """Prints nothing but answers to the standard output. Returns 1 if a turn got no answer."""
    code = 0
    for turn in turns:
        if not turn.strip():
            continue
        try:
            if commands and _COMMAND.match(turn):
                if not obey(chat, turn, lambda text: say(text, err=True)):
                    break
                continue
            answer = chat.ask(turn, write)
        except ValueError as error:
            say(f"Error: {error}", err=True)
            code = 1
            continue
        say()
        if answer.ended == "interrupted":
            return INTERRUPTED
        _print_end(answer, err=True)
    return code


def _in_terminal(chat: Chat) -> None:
    import readline  # noqa: F401  (input() then has a history, and keys to edit with)

    while True:
        try:
            turn = input("> ")
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends", dim=True)
            continue
        except EOFError:
            say()
            return
        if not turn.strip():
            continue
        try:
            if _COMMAND.match(turn):
                if not obey(chat, turn, lambda text: say(text, dim=True)):
                    return
                continue
            answer = chat.ask(turn, Painted())
        except ValueError as error:
            say(str(error), fg="red")
            continue
        say()
        _print_end(answer, err=False)


def obey(chat: Chat, turn: str, tell: Callable[[str], None]) -> bool:
    """Runs a turn that is a command. Returns False for /quit. Raises ValueError for an unknown command."""
    match = _COMMAND.match(turn.strip())
    assert match is not None, "the turn is a command"
    command, argument = match[1], match[2]
    if command == "quit":
        return False
    if command in ("think", "no_think"):
        chat.think(command == "think")
        tell("thinking" if command == "think" else "not thinking")
    elif command == "reset":
        chat.turns.clear()
        tell("the conversation is forgotten")
    elif command == "system":
        chat.system = argument or None
        tell("system message set" if argument else "no system message")
    elif command == "help":
        tell(HELP)
    else:
        raise ValueError(f"found /{command}; {HELP}")
    return True


def write(text: str, **style: Any) -> None:
    """Writes a piece of an answer: as it is to a pipe or a file, which a program reads, or as text to a terminal."""
    if sys.stdout.isatty():
        say(text, nl=False, **style)
    else:
        sys.stdout.write(text)
        sys.stdout.flush()


class Painted:
    """Writes an answer as it comes, its thoughts dim."""

    def __init__(self) -> None:
        self._text = ""

    def __call__(self, text: str) -> None:
        self._text += text
        is_thought = self._text.rfind("<think>") > self._text.rfind("</think>")
        # Write the rest without any style: text with a style code for every token copies badly.
        write(text, **({"dim": True} if is_thought or text.endswith("</think>") else {}))


def _print_end(answer: Answer, *, err: bool) -> None:
    if answer.ended == "length":
        say(f"[cut off after {answer.num_tokens} tokens]", dim=True, err=err)
    elif answer.ended == "interrupted":
        say(f"[stopped after {answer.num_tokens} tokens]", dim=True, err=err)
