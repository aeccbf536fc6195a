"""What README.md and the pages of docs/ show works as it stands there, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest

from sft_core.recipe.recipe import Phase, Recipe
from sft_core.recipe.sections import Section
from steps.cli.main import main
from tests.flows.conftest import ROOT, Project

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "LOG.md", ROOT / "deploy" / "metaflow-ui" / "README.md"]
TEXT = "\n".join(page.read_text() for page in PAGES)
MAX_README_LINES = 150


def block(language: str, containing: str) -> str:
    blocks = [text for text in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if containing in text]
    assert len(blocks) == 1, f"one {language} block with {containing!r}"
    return blocks[0]


def test_readme_has_at_most_150_lines() -> None:
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


def test_first_screen_of_the_readme_says_what_ran_on_a_gpu_and_the_command_that_proves_it() -> None:
    screen = " ".join(README.read_text().splitlines()[:30])
    assert "`make gpu`" in screen and "(docs/results.md#hardware)" in screen
    assert re.search(r"\b(has run|have run|ran|runs?) on (a|an|one|no)\b[^.]*\b(GPU|H100|H200|A100)\b", screen)


def test_recipe_in_the_readme_is_valid() -> None:
    from sft_core.recipe.parse import parse_recipe, read_yaml

    assert parse_recipe(read_yaml(block("yaml", "name: my-model"))).last_phase.training.lora is not None


def test_commands_in_the_pages_exist() -> None:
    commands = set(re.findall(r"`sft (\w+)", TEXT)) | set(re.findall(r"^sft (\w+)", TEXT, re.MULTILINE))
    assert {"plan", "show", "scores", "resume", "init", "store"} <= commands
    assert commands <= set(main.commands)
    targets = set(re.findall(r"^make ([\w-]+)", TEXT, re.MULTILINE)) | set(re.findall(r"`make ([\w-]+)", TEXT))
    makefile = (ROOT / "Makefile").read_text()
    assert {"run", "gpu"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    recipes = set(re.findall(r"configs/[\w.-]+\.yaml", TEXT))
    assert recipes and all((ROOT / recipe).is_file() for recipe in recipes)
    scripts = set(re.findall(r"python ([\w/-]+\.py)", TEXT))
    scripts |= {f"benchmarks/{name}" for name in re.findall(r"^\| `(\w+\.py)`", TEXT, re.MULTILINE)}
    assert {"flows/sft_flow.py", "benchmarks/search.py", "benchmarks/packing.py"} <= scripts
    assert [script for script in sorted(scripts) if not (ROOT / script).is_file()] == []


def sft_commands() -> Iterator[list[str]]:
    """The words of every `sft ...` in the pages, in a block or in a sentence."""
    for line in re.findall(r"^(?:\$ )?(sft .*)$|`(sft [^`]+)`", TEXT, re.MULTILINE):
        yield shlex.split("".join(line), comments=True)


def test_options_of_sft_in_the_pages_exist() -> None:
    seen = 0
    for _, *words in sft_commands():
        command: click.Command = main
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= known, f"{command.name}: {options - known}"
        seen += len(options)
    assert seen > 10


def targets_of(page: Path) -> list[str]:
    """Where the page's links and pictures lead, but for other sites."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(\s*([^)\s]+)\s*\)", text) + re.findall(r'src="([^"]+)"', text)
    return [target for target in targets if not target.startswith(("http://", "https://"))]


def anchors_of(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    lost = []
    for target in targets_of(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            lost.append(target)
    assert lost == []


def test_every_page_is_linked_from_the_readme_and_every_picture_is_shown() -> None:
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in LINKED for target in targets_of(page)}
    of_readme = {(ROOT / target.partition("#")[0]).resolve() for target in targets_of(README)}
    pictures = sorted((ROOT / "docs" / "pictures").glob("*.png"))
    assert len(PAGES) > 10 and len(pictures) > 5
    assert [page for page in PAGES[1:] if page not in of_readme] == []
    assert [picture for picture in pictures if picture not in linked] == []


def recipe_keys_script() -> Any:
    spec = importlib.util.spec_from_file_location("recipe_keys", ROOT / "docs" / "recipe_keys.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_of_recipe_keys_is_as_the_script_writes_it() -> None:
    script = recipe_keys_script()
    assert script.PAGE.read_text() == script.page(), "the recipe changed: python docs/recipe_keys.py"


def keys(section: type[Section], path: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{path}{name}"
        for inner, is_one_of_many in sections_in(field.annotation):
            if inner is Phase:  # whose keys stand at the root of a recipe of one phase
                yield from keys(inner)
            else:
                yield from keys(inner, f"{path}{name}.{'NAME.' if is_one_of_many else ''}")


def sections_in(annotation: Any, is_one_of_many: bool = False) -> Iterator[tuple[type[Section], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, is_one_of_many
    for argument in get_args(annotation):
        yield from sections_in(argument, is_one_of_many or getattr(annotation, "__origin__", None) is tuple)


def test_every_key_of_a_recipe_has_a_line_with_its_meaning() -> None:
    lines = (ROOT / "docs" / "recipe.md").read_text().splitlines()
    all_keys = [*keys(Recipe)]
    assert {"name", "dataset_mixture.datasets.NAME.weight", "runtime.resources.train.gpu"} <= set(all_keys)
    assert [key for key in all_keys if not any(line.startswith(f"| `{key}` |") for line in lines)] == []
    assert [line for line in lines if line.startswith("|") and line.rstrip("| ").count("|") < 4] == []


@pytest.mark.slow
def test_checkpoint_answers_by_the_pages_code(finished: Project) -> None:
    folder = next(path for path in finished.store.glob("release/*/model"))
    code = block("python", "apply_chat_template").replace("store/release/KEY/model", str(folder))
    assert str(folder) in code
    (finished.folder / "ask.py").write_text(code)
    answer = finished.call([sys.executable, str(Path(finished.folder) / "ask.py")])
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\n" in answer
