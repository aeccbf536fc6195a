"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from steps.cli import main
from tests.flows.conftest import ROOT, Project

README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text]
    assert len(found) == 1, f"one {language} block with {containing!r}"
    return found[0]


def test_recipe_in_the_readme_is_valid() -> None:
    from sft_core.recipe import parse_recipe, read_yaml

    assert parse_recipe(read_yaml(block("yaml", "dataset_mixture"))).training.lora is not None


def test_commands_in_the_readme_exist() -> None:
    commands = set(re.findall(r"`sft (\w+)", README)) | set(re.findall(r"^sft (\w+)", README, re.MULTILINE))
    assert {"plan", "show", "scores", "resume", "init", "store"} <= commands
    assert commands <= set(main.commands)
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    recipes = set(re.findall(r"configs/[\w.-]+\.yaml", README))
    assert recipes and all((ROOT / recipe).is_file() for recipe in recipes)


def test_pictures_and_folders_in_the_readme_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_checkpoint_answers_by_the_readmes_code(finished: Project) -> None:
    folder = next(path for path in finished.store.glob("release/*/model"))
    code = block("python", "apply_chat_template").replace("store/release/KEY/model", str(folder))
    assert str(folder) in code
    (finished.folder / "ask.py").write_text(code)
    answer = finished.call([sys.executable, str(Path(finished.folder) / "ask.py")])
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\n" in answer
