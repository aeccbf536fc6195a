"""`sft chat` as a process: one turn, piped lines, a terminal; and what a name of a checkpoint means."""

import dataclasses
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps.cli.chat import find_checkpoint
from steps.train import TRAINED
from tests.evaluate.chained import NO_THINK, SMILE, THINK, chained
from tests.hub_server import HubServer
from tests.store.test_damage import flip_first_byte

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 60
PLAIN = ("--template-kwarg", "header=false")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chained(tmp_path_factory.mktemp("chained"), {THINK: SMILE, NO_THINK: "no"})


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chained(tmp_path_factory.mktemp("endless"), {THINK: "abc", NO_THINK: "no"}, endless=True, context=100_000)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "steps.cli.main", "chat", *map(str, arguments)]


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "TERM": "xterm"}


def chat(folder: Path, *arguments: object, said: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(folder),
        input=said,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
def test_chat_prompt_prints_the_answer_alone(model: Path, tmp_path: Path):
    done = chat(tmp_path, model, "--prompt", "hello", *PLAIN)
    assert (done.stdout, done.stderr) == (SMILE + "\n", "")


@pytest.mark.long
def test_chat_with_a_model_of_the_hub_and_again_without_it(model: Path, tmp_path: Path):
    arguments = command("org/chained", "--prompt", "hello", *PLAIN)
    with HubServer() as hub:
        hub.publish("models", "org/chained", {path.name: path.read_bytes() for path in model.iterdir()})
        settings = hub.environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
        options: dict[str, Any] = {"cwd": tmp_path, "env": settings, "capture_output": True, "timeout": TIMEOUT_S}
        first = subprocess.run(arguments, **options, check=False, text=True, encoding="utf-8")
        assert first.returncode == 0, first.stderr
    again = subprocess.run(arguments, **options, check=False, text=True, encoding="utf-8")
    assert again.returncode == 0, again.stderr
    assert first.stdout == again.stdout == SMILE + "\n"


@pytest.mark.slow
def test_chat_no_think_is_another_prompt(model: Path, tmp_path: Path):
    assert chat(tmp_path, model, "--prompt", "hello", "--no-think", *PLAIN).stdout == "no\n"


@pytest.mark.slow
def test_chat_piped_lines_are_turns_and_commands(model: Path, tmp_path: Path):
    lines = ["hello", "", "/no_think", "again", "/system Be kind.", "/reset", "/think", "more", "/quit", "not asked"]
    done = chat(tmp_path, model, *PLAIN, said="\n".join(lines))
    assert done.stdout.splitlines() == [SMILE, "no", SMILE]
    assert done.stderr.splitlines() == [
        "not thinking",
        "system message set",
        "the conversation is forgotten",
        "thinking",
    ]


@pytest.mark.slow
def test_chat_piped_turn_without_room_is_told_and_the_others_are_answered(tmp_path: Path):
    small = chained(tmp_path / "small", {THINK: "ok"}, context=64)
    done = chat(tmp_path, small, *PLAIN, said=f"hi\n{'x' * 100}\n/nonsense\nhi\n", code=1)
    assert done.stdout == "ok\nok\n"
    first, second = done.stderr.splitlines()
    assert first.startswith("Error: the conversation has ") and "the model's context is 64" in first
    assert second.startswith("Error: found /nonsense; /think and /no_think switch thinking")


def as_in_a_shell() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background of a shell inherit it ignored
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the controlling terminal


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, arguments: list[str], folder: Path):
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            arguments,
            cwd=folder,
            env=environment(folder),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=as_in_a_shell,
        )
        os.close(slave)
        self.seen = b""

    def wait_for(self, text: str, after: int = 0, press: str = "") -> int:
        """Reads on until the text has come; the place where it ends.

        press: typed once a second. readline shows a prompt a moment before it sees a signal.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while (place := self.seen.find(text.encode(), after)) < 0:
            self.type(press)
            assert time.monotonic() < deadline and self.process.poll() is None, self.seen[-2000:].decode()
            if select.select([self._master], [], [], 1.0)[0]:
                self.seen += os.read(self._master, 65536)
        return place + len(text.encode())

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(endless: Path, tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(command(endless, "--max-new-tokens", 90_000, *PLAIN), tmp_path)
    yield opened
    opened.close()


@pytest.mark.slow
def test_chat_ctrl_c_stops_the_answer_and_ctrl_d_the_program(terminal: Terminal):
    place = terminal.wait_for("> ")
    terminal.type("hello\n")
    place = terminal.wait_for("abcabc", place)
    terminal.type("\x03")
    place = terminal.wait_for("> ", terminal.wait_for("[stopped after ", place))
    terminal.type("/system Be kind.\n")
    place = terminal.wait_for("> ", terminal.wait_for("system message set", place))
    place = terminal.wait_for("> ", terminal.wait_for("/quit or Ctrl-D ends", place, press="\x03"))
    terminal.type("\x04")
    assert terminal.process.wait(timeout=TIMEOUT_S) == 0
    assert b"Traceback" not in terminal.seen


# What a name means


@pytest.fixture
def stored(built_recipe: dict[str, Any], model: Path) -> tuple[Store, Ref]:
    """A store with a checkpoint: the built packs, and what stands in the place of their training."""

    def build(build: Any, **settings: Any) -> dict[str, Any]:
        shutil.copytree(model, build.out / "model")
        return {"round": 0, "steps": 1, "first_loss": 2.0, "last_loss": 1.0}

    built_recipe["chat_template"]["kwargs"] = {"header": False}
    pinned, store = pin(parse_recipe(built_recipe)), Store(built_recipe["runtime"]["store"])
    return store, store.ensure(dataclasses.replace(TRAINED, build=build, resumable=False), pinned, round=0)


@pytest.mark.slow
def test_chat_knows_the_template_kwargs_of_a_stored_checkpoint(stored: tuple[Store, Ref], tmp_path: Path, monkeypatch):
    store, ref = stored
    for name in (str(ref), f"{ref.stage}/{ref.key[:6]}", str(store.path(ref)), str(store.path(ref) / "model")):
        place = find_checkpoint(name, str(store.root))
        assert Path(place.path) == store.path(ref) / "model"
        assert place.kwargs == {"header": False}
    # The chained model answers to a prompt's end alone, which the header does not change: the template sees the kwarg.
    assert chat(tmp_path, ref, "--store", store.root, "--prompt", "hello").stdout == SMILE + "\n"


def test_chat_damaged_checkpoint_is_told_by_whatever_name(stored: tuple[Store, Ref], sft):
    store, ref = stored
    folder = store.path(ref)
    flip_first_byte(folder / "model" / "model.safetensors")
    for name in (str(ref), str(folder), str(folder / "model")):
        told = sft("chat", name, "--store", store.root, "--prompt", "hello", code=1).stderr
        assert f"{ref}: model/model.safetensors has" in told and f"sft store gc {ref} --delete" in told


def test_chat_folder_outside_a_store_has_no_kwargs(model: Path, tmp_path: Path):
    assert find_checkpoint(str(model), "store") == (str(model), {}, None)
    shutil.copytree(model, tmp_path / "app" / "model")
    (tmp_path / "app" / "manifest.json").write_text('{"name": "a web app\'s"}')
    assert find_checkpoint(str(tmp_path / "app" / "model"), "store").kwargs == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("packed/", "holds no model; a checkpoint is an output of trained, checkpoint, delivered, release"),
        ("trained/zz", "no output of the store"),
        ("./none", "found './none'; no such folder"),
        ("{empty}", "holds no config.json"),
        ("{adapter}", "holds an adapter alone; name the folder of the merged model"),
        ("latest", "no run is recorded here"),
        ("SFTFlow/12", "no run is recorded here"),
    ],
)
def test_chat_names_that_mean_no_checkpoint_are_told(
    sft, built_recipe, tmp_path: Path, monkeypatch, name: str, message: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    name = name.format(empty=tmp_path / "empty", adapter=tmp_path / "adapter")
    told = sft("chat", name, "--prompt", "x", "--store", built_recipe["runtime"]["store"], code=1)
    assert told.stderr.startswith("Error: ") and message in told.stderr


def test_chat_template_kwarg_without_a_value_is_told(sft, model: Path):
    assert (
        "--template-kwarg: found 'header'; write NAME=VALUE"
        in sft("chat", model, "--prompt", "x", "--template-kwarg", "header", code=1).stderr
    )
