"""Outputs whose identity has a version: their manifest says by which code and libraries, and a drift is told."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from sft_core.store import code_digest
from sft_core.store.made_by import MadeBy, drift, made_by
from sft_core.store.stage import Build, Located, Stage
from sft_core.store.store import Store
from steps.download import CONVERSATIONS
from steps.plan import drifts
from tests.store.test_store import toy

FILES = {
    "__init__": "",
    "main": "from sft_core.kinds import registry\n",
    "kinds/__init__": "",
    "kinds/registry": "import importlib, pkgutil\nfrom sft_core.kinds import members\nload = importlib.import_module\n",
    "kinds/members/__init__": "",
    "kinds/members/first": "from sft_core import used\n",
    "kinds/members/second": "",
    "used": "ONE = 1\n",
    "unrelated": "",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "sft_core" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(code_digest, "ROOT", tmp_path)
    return tmp_path / "sft_core"


def names(by: MadeBy) -> set[str]:
    return {name.removeprefix("sft_core.") for name in by["modules"]}


def test_modules_that_a_registry_loads_are_among_them(project: Path):
    found = names(made_by(["sft_core.main"], []))
    assert found == {name.replace("/", ".").removesuffix(".__init__") for name in FILES} - {"__init__", "unrelated"} | {
        "sft_core"
    }
    assert made_by(["elsewhere.module"], [])["modules"] == {}


def test_drift_names_what_changed_and_no_comment(project: Path):
    before = made_by(["sft_core.main"], [])
    (project / "used.py").write_text("# a comment\nONE = 1\n")
    assert drift(before, made_by(["sft_core.main"], [])) is None
    (project / "used.py").write_text("ONE = 2\n")
    (project / "kinds" / "members" / "third.py").write_text("")
    assert drift(before, made_by(["sft_core.main"], [])) == (
        "made by other code of sft_core/kinds/members/third.py, sft_core/used.py"
    )


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        ({"torch": "2.12.0"}, {"torch": "2.13.0"}, "made by torch 2.12.0 (now: 2.13.0)"),
        ({"torch": "2.12.0"}, {"torch": None}, "made by torch 2.12.0 (now: not installed)"),
        ({"vllm": None, "torch": "1"}, {"vllm": "0.9", "torch": "1"}, "made by vllm not installed (now: 0.9)"),
        ({"torch": "2.13.0"}, {"torch": "2.13.0", "trl": "1.16"}, None),
    ],
)
def test_drift_of_libraries(before: dict[str, str | None], now: dict[str, str | None], text: str | None):
    assert drift(MadeBy(modules={}, libraries=before), MadeBy(modules={}, libraries=now)) == text


def test_many_changed_modules_are_counted():
    before = MadeBy(modules={f"sft_core.m{n}": "a" for n in range(5)}, libraries={})
    now = MadeBy(modules={f"sft_core.m{n}": "b" for n in range(5)}, libraries={})
    assert drift(before, now) == "made by other code of sft_core/m0.py, sft_core/m1.py, sft_core/m2.py and 2 more"


def build_nothing(build: Build, **section: Any) -> dict[str, Any]:
    return {}


def test_output_with_a_version_stays_a_hit_and_the_plan_tells_its_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    versioned = Stage("versioned", build_nothing, lambda pinned, part: {"of": part}, version=1, libraries=("numpy",))
    store, pinned = Store(tmp_path), toy()
    store.ensure(versioned, pinned, part="a")

    def planned(*parts: str) -> list[Located]:
        return [store.locate(versioned, pinned, {"part": part}) for part in parts]

    (first,) = planned("a")
    made = store.manifest(first.ref)["made_by"]
    assert made["libraries"] == {"numpy": importlib.metadata.version("numpy")} and made["modules"][__name__]
    assert CONVERSATIONS.made_by(()) is None, "the code is in its identity"
    assert drifts(store, pinned, planned("a", "b")) == []
    monkeypatch.setattr("sft_core.store.made_by._version", lambda library: "9.9")
    assert [located.status for located in planned("a")] == ["hit"]
    (line,) = drifts(store, pinned, planned("a", "b"))
    assert line.startswith(f"{first.ref}: made by numpy {made['libraries']['numpy']} (now: 9.9). `sft store gc")
    assert f"gc {first.ref} --delete` lets the next run make it anew" in line
    store.ensure(versioned, pinned, part="b")  # made by the version that is here now
    assert drifts(store, pinned, planned("a", "b")) == [line]
    monkeypatch.setattr("sft_core.store.made_by._version", lambda library: "10")
    lines = drifts(store, pinned, planned("a", "b"))
    assert len(lines) == 2 and all("(now: 10)" in line for line in lines)
