"""A run whose recipe has a hub section, in the real flow."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import pytest

from tests.data.sources.test_hub_token import holders
from tests.flows.conftest import RECIPE, Project
from tests.hub_server import HubServer

TOKEN = "hf_TheFlowMayOpenSesame0123456789"


class PushingProject(Project):
    """The same folder, with a hub and a token in the environment."""

    server: HubServer
    token = TOKEN

    @property
    def environment(self) -> dict[str, str]:
        return {**self.server.environment(self.folder), **super().environment, "HF_TOKEN": self.token}


@pytest.fixture
def project(finished: Project) -> Iterator[PushingProject]:
    pushing = PushingProject(finished.folder)
    with HubServer() as pushing.server:
        pushing.server.enrol(TOKEN, "me")
        pushing.write({**copy.deepcopy(RECIPE), "hub": {"model_id": "me/small"}}, "pushed.yaml")
        yield pushing


@pytest.mark.long
def test_run_pushes_once_and_prints_where_and_a_token_that_is_unknown_ends_it_first(project: PushingProject) -> None:
    project.token = "hf_NobodyKnowsThisOne"
    before = len(project.builds())
    refused = project.run("run", recipe="pushed.yaml", succeeds=False)
    assert "HF_TOKEN: the hub does not know this token; set one that may write" in refused
    assert project.token not in refused and len(project.builds()) == before

    project.token = TOKEN
    output = project.run("run", recipe="pushed.yaml")
    assert [build["stage"] for build in project.builds()[before:]] == ["pushed"]
    commit = project.server.revisions["models", "me/small"]["main"]
    assert f"pushed: {project.server.endpoint}/me/small/tree/{commit}" in output
    (checkpoint,) = re.findall(r"checkpoint: (\S+)", output)
    released = project.folder / checkpoint
    files = project.server.commits["models", "me/small"][commit]
    assert {path.name for path in released.iterdir()} == files.keys() - {".gitattributes"}

    writes = project.server.num_writes()
    project.run("run", recipe="pushed.yaml")
    assert project.server.num_writes() == writes, "a hit is not pushed again"
    assert f"/tree/{commit}" in project.sft("scores")
    assert holders(project.folder, TOKEN) == []
