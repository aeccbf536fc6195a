"""Which source is told of: that of a checkout, never of another one around it or in the environment."""

import subprocess
from pathlib import Path

import pytest

from sft_core.store.provenance import DISTRIBUTION, source_code, source_label


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with one commit that holds a module."""
    root = tmp_path / "checkout"
    (root / "steps").mkdir(parents=True)
    (root / "steps" / "one.py").write_text("1\n")
    git(root, "init", "--quiet")
    git(root, "add", "steps")
    git(root, "commit", "--quiet", "-m", "one")
    return root


@pytest.fixture(autouse=True)
def asked_anew():
    source_code.cache_clear()
    yield
    source_code.cache_clear()


def test_source_code_of_a_clean_checkout_is_its_commit(checkout: Path):
    (checkout / "notes.txt").write_text("what nothing runs is not told of")
    commit = git(checkout, "rev-parse", "HEAD")
    found = source_code(checkout)
    assert found == {"version": found["version"], "commit": commit, "dirty": False}
    assert source_label(found) == commit[:7]


@pytest.mark.parametrize("name", ["one.py", "new.py"])
def test_source_code_with_a_change_or_a_new_module_is_dirty(checkout: Path, name: str):
    (checkout / "steps" / name).write_text("2\n")
    found = source_code(checkout)
    assert found["dirty"] is True
    assert source_label(found) == git(checkout, "rev-parse", "HEAD")[:7] + "-dirty"


def test_source_code_below_somebody_elses_checkout_is_not_its_commit(checkout: Path):
    found = source_code(checkout / "steps")
    assert (found["commit"], found["dirty"]) == (None, None)
    assert source_label(found) == found["version"]


def test_source_code_in_a_hook_of_another_repository_is_this_ones(checkout: Path, tmp_path: Path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    git(other, "commit", "--quiet", "--allow-empty", "-m", "other")
    own = git(checkout, "rev-parse", "HEAD")
    assert own != git(other, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert source_code(checkout)["commit"] == own


def test_source_code_without_git_is_the_version(checkout: Path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = source_code(checkout)
    assert found["commit"] is None and source_label(found) == found["version"]


def test_source_code_version_is_that_of_the_project():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'name = "{DISTRIBUTION}"' in text
    version = source_code()["version"]
    assert version is None or f'version = "{version}"' in text
