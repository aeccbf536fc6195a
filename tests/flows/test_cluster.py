"""The flow on a cluster, as far as it shows without one: what Argo Workflows is given, and the code that goes along."""

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sft_core.recipe.parse import load_recipe, parse_recipe
from steps.start import check_place
from tests.flows.conftest import RECIPE, ROOT, TIMEOUT_S, Project
from tests.object_server import ObjectServer

pytestmark = pytest.mark.slow

IMAGE = "registry.example/sft-flow:1"
SMOLLM3 = ROOT / "configs" / "smollm3.yaml"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The workflow template of smollm3.yaml, and the folder of its code as a task unpacks it."""
    project = Project(tmp_path_factory.mktemp("cluster"))
    with ObjectServer() as server:
        environment = {
            **project.environment,
            **server.environment,
            "METAFLOW_USER": "someone",
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": f"{server.bucket('metaflow')}/records",
            "METAFLOW_S3_ENDPOINT_URL": server.environment["AWS_ENDPOINT_URL"],
            "METAFLOW_DEFAULT_METADATA": "local",
            "METAFLOW_SERVICE_URL": "http://metadata.example",
        }
        done = subprocess.run(
            project.command(
                *("--with", f"kubernetes:image={IMAGE}", "argo-workflows", "create", "--only-json"), recipe=str(SMOLLM3)
            ),
            cwd=project.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        (package,) = [name for name in server.names("metaflow") if "/data/" in name]
        code = server.client.get_object(Bucket="metaflow", Key=package)["Body"].read()
    folder = tmp_path_factory.mktemp("code")
    with tarfile.open(fileobj=io.BytesIO(code)) as archive:
        archive.extractall(folder)
    return json.loads(done.stdout), folder


def template(workflow: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in workflow["spec"]["templates"] if one["name"] == name]
    return found


def test_workflow_asks_for_what_the_recipe_says(compiled: tuple[dict[str, Any], Path]):
    workflow, _ = compiled
    for name in ("download", "render", "tokenize", "mix", "pack", "recursive-train", "evaluate", "report"):
        assert template(workflow, name)["container"]["image"] == IMAGE
    wanted = load_recipe(SMOLLM3).runtime.resources
    for name, asked in (("tokenize", wanted.data), ("recursive-train", wanted.train), ("evaluate", wanted.evaluate)):
        found = template(workflow, name)["container"]["resources"]
        assert float(found["requests"]["cpu"]) == asked.cpu
        assert float(found["requests"]["memory"].removesuffix("M")) == asked.memory
        assert found["limits"].get("nvidia.com/gpu") == (asked.gpu and str(asked.gpu))


def test_workflow_trains_on_a_gang_of_nodes(compiled: tuple[dict[str, Any], Path]):
    workflow, _ = compiled
    manifest = re.sub(r"\{\{=.*?\}\}", "1", template(workflow, "train-on-nodes")["resource"]["manifest"])  # Argo's own
    gang = YAML(typ="safe", pure=True).load(manifest)
    assert gang["kind"] == "JobSet"
    jobs = {job["name"]: job["template"]["spec"]["template"]["spec"] for job in gang["spec"]["replicatedJobs"]}
    assert set(jobs) == {"control", "worker"}
    for pod in jobs.values():
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert any(volume.get("emptyDir", {}).get("sizeLimit") == "64000Mi" for volume in pod["volumes"])


def test_code_that_goes_along_is_whole(compiled: tuple[dict[str, Any], Path]):
    """What is unpacked finds its accelerate configs, its template and its steps, and nothing of this checkout."""
    _, folder = compiled
    (flow,) = folder.rglob("sft_flow.py")
    look = (
        "from sft_core.train.strategy import environment; from sft_core.recipe.rank_strategies import STRATEGIES;"
        "from sft_core import pins; import steps.cli.main, sys;"
        "print([environment(one) != {} for one in STRATEGIES], pins.__file__, steps.cli.main.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", look],
        cwd=flow.parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "[False, True, True, True]" in done.stdout
    assert done.stdout.count(str(flow.parent)) == 2
    for name in ("configs/accelerate/zero3.yaml", "configs/templates/thinking.jinja"):
        assert (flow.parent / name).read_bytes() == (ROOT / name).read_bytes()


def test_store_in_a_relative_folder_is_refused_on_a_cluster(monkeypatch: pytest.MonkeyPatch):
    recipe = parse_recipe(RECIPE)
    check_place(recipe)
    monkeypatch.setenv("METAFLOW_KUBERNETES_WORKLOAD", "1")
    with pytest.raises(ValueError, match=r"runtime\.store: found 'store'; tasks on a cluster share no working folder"):
        check_place(recipe)
    for store in ("s3://bucket/prefix", "/shared/store"):
        check_place(parse_recipe({**RECIPE, "runtime": {"store": store}}))
