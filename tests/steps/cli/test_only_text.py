"""What `sft` writes of data is text: a terminal gets no control character of it, and Rich reads no markup in it."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from sft_core.report.shown import shown
from sft_core.store.ref import Ref
from sft_core.store.store import Store
from steps import report
from steps.cli import answers, compare, lineage, row_journey
from steps.cli.main import Commands
from steps.console import TextConsole
from tests.steps.cards.outputs import saved
from tests.terminal import in_terminal, without_colours

ROOT = Path(__file__).resolve().parents[3]
# Clears a terminal, sets its title, paints, goes back in the line, turns the direction; then markup of Rich.
HOSTILE = (
    "\x1b[2J\x1b]0;title\x07\x9b31m\x1b[31mred\rover\x08\u202eback\u2067\u200f\u2028 [bold]x[/bold] [/] :smile: \\[a]\\"
)
SHOWN = shown(HOSTILE)


def is_text(output: str, *, holds: str = SHOWN) -> bool:
    """Whether the output shows the hostile text, folded or not, and holds no character that acts but our colours."""
    plain = without_colours(output)
    acting = re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", plain)
    return not acting and "".join(holds.split()) in "".join(re.sub(r"[│┃]", "", plain).split())


def printed(*renderables: Any) -> str:
    """What a terminal of 4000 columns gets of them."""
    file = io.StringIO()
    TextConsole(file=file, force_terminal=True, width=4000, color_system="truecolor").print(*renderables, sep="\n")
    return file.getvalue()


@pytest.mark.slow
def test_show_and_check_of_hostile_rows_in_a_terminal(small_recipe: dict[str, Any], save_recipe: Any, tmp_path: Path):
    messages = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"{HOSTILE}\nend"}]
    (tmp_path / "hostile.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(40)))
    small_recipe["dataset_mixture"]["datasets"][0] = {"path": str(tmp_path / "hostile.jsonl")}
    recipe = save_recipe(small_recipe)
    output = in_terminal("-m", "steps.cli.main", "show", recipe, "--source", "hostile")
    assert is_text(output, holds=f"{SHOWN}\nend") and "\x1b[32m" in output, "trained text is green"
    assert f"{SHOWN}\nend" in without_colours(output), "lines stay"
    piped = [sys.executable, "-m", "steps.cli.main", "show", recipe, "--source", "hostile"]
    assert f"{SHOWN}\nend" in subprocess.run(piped, cwd=ROOT, capture_output=True, check=True).stdout.decode()


def test_error_messages_are_text():
    @click.group(cls=Commands)
    def group() -> None:
        pass

    @group.command()
    def fails() -> None:
        error = ValueError(f"row: {HOSTILE}")
        error.add_note(HOSTILE)
        raise error

    result = CliRunner().invoke(group, ["fails"], color=True)
    assert result.exit_code == 1 and is_text(result.output, holds=f"Error: row: {SHOWN}({SHOWN})")


def test_answers_are_text_and_their_json_means_the_same(monkeypatch: pytest.MonkeyPatch):
    from steps.cli import after_a_run
    from steps.runs import recorded

    row = {"task": HOSTILE, "row_id": HOSTILE, "change": "won", "score": {"base": 0.0, "tuned": 1.0}, "asked": HOSTILE}
    row |= {"wanted": HOSTILE, "base": [HOSTILE], "tuned": [HOSTILE]}
    output = printed(answers.as_text(row))
    assert is_text(output) and without_colours(output).count(SHOWN) == 6
    monkeypatch.setattr(recorded, "recorded", lambda run: None)
    monkeypatch.setattr(answers, "answers", lambda *_: iter([row]))
    result = CliRunner().invoke(after_a_run.answers, ["latest", "--json"])
    assert json.loads(result.output) == row and not re.search(
        "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", result.output
    )


def test_compare_lineage_and_a_rows_journey_are_text(tmp_path: Path):
    run = {"id": HOSTILE, "recipe": HOSTILE, "created": HOSTILE, "finished": True, "commit": HOSTILE}
    comparison: Any = {
        "runs": [run, run],
        "recipe": [{"key": HOSTILE, "a": HOSTILE, "b": [HOSTILE]}],
        "amounts": [{"name": HOSTILE, "a": 1, "b": 2}],
        "scores": [{"task": HOSTILE, "metric": HOSTILE, "a": None, "b": None, "difference": None}],
    }
    assert is_text(printed(*compare.as_tables(comparison)))

    store = Store(tmp_path / "store")
    score = {"metric": HOSTILE, "value": 0.5, "stderr": None, "n": 1}
    gone = Ref("tokens", "0" * 16)
    ref = saved(store, "evaluated", {"task": HOSTILE, "model": HOSTILE}, {"scores": [score]}, inputs={HOSTILE: gone})
    output = printed(lineage.as_tree(store, lineage.trace(store, ref)))
    assert is_text(output, holds=f"{SHOWN} {SHOWN}  {SHOWN} 0.5000") and lineage.GONE in output

    journey: Any = {
        **{"row_id": HOSTILE, "source": HOSTILE, "conversations": HOSTILE, "where": [HOSTILE], "prompt_hash": 1},
        **{"split": HOSTILE, "rendered": HOSTILE, "texts": [{"sha256": "0" * 64, "characters": 3}], "tokens": HOSTILE},
        "rows": [{"row": 0, "shard": 0, "num_tokens": 1, "num_trained": 1}],
        "packs": [{"packed": HOSTILE, "packs": [1], "num_tokens": [1], "steps": {HOSTILE: [1]}}],
    }
    output = printed(row_journey.as_tree(journey))
    assert is_text(output) and without_colours(output).count(SHOWN) == 9


def test_scores_are_text_and_red_in_a_terminal(monkeypatch: pytest.MonkeyPatch):
    row = {"task": HOSTILE, "metric": HOSTILE, "n": 9, "base": 0.5, "tuned": 0.0, "stderr": 0.1}
    row |= {"difference": -0.5, "low": -0.8, "high": -0.2, "flags": HOSTILE}
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    output = report.summary([row], [], HOSTILE, HOSTILE, whole=True)
    assert is_text(output) and without_colours(output).count(SHOWN) == 5 and "\x1b[1;31m" in output


@pytest.mark.slow
def test_answer_in_a_terminal_is_text_and_in_a_pipe_what_the_model_wrote():
    program = f"from steps.cli.chat import Painted, write; write({HOSTILE!r}); Painted()('<think>' + {HOSTILE!r})"
    assert is_text(in_terminal("-c", program), holds=f"{SHOWN}<think>{SHOWN}")
    piped = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    assert piped == f"{HOSTILE}<think>{HOSTILE}"


def test_console_shows_what_a_text_was_made_of_without_it():
    from rich.text import Text

    assert "\x1b[2J" in Text(HOSTILE).plain, "Rich keeps escape sequences"
    output = printed(Text(HOSTILE))
    assert "␛[2J" in output and not re.search("[\x00-\x09\x0b-\x1f\x80-\x9f\u2028-\u202e]", without_colours(output))


def test_cli_writes_by_say_and_rich_by_one_console():
    writers = ("click.echo", "click.secho", "print", "Console")
    found = []
    for path in sorted((ROOT / "steps").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in writers:
                found.append(f"{path.name}: {ast.unparse(node.func)}")
            if isinstance(node, ast.ImportFrom) and node.module == "rich.console":
                found += [f"{path.name}: {alias.name}" for alias in node.names]
    assert found == ["compare.py: RenderableType", "say.py: click.echo", "say.py: click.echo", "console.py: Console"]
