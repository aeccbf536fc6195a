"""The Metaflow UI in containers: what can be held without Docker."""

from __future__ import annotations

import pickle
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sft_core.recipe.parse import load_recipe
from steps.runs.recipes import parse_config
from tests.flows.test_service import UI_LIMIT

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "metaflow-ui"
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
PINNED = r"\S+:v?\d+\.\d+[\w.-]*"


@pytest.fixture
def compose() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((FOLDER / "compose.yaml").read_text())


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text()
    images = [service["image"] for service in compose["services"].values()] + re.findall(
        r"^FROM (.+)$", dockerfile, re.M
    )
    assert len(images) == 5
    assert [image for image in images if not re.fullmatch(PINNED, image)] == []
    assert re.findall(r"metaflow==([\d.]+)$", dockerfile, re.M) == ["2.17.5"]


def test_opening_a_task_leaves_its_logs_where_they_are(tmp_path: Path) -> None:
    """The backend's line, and what the image's build makes of it; without the line the build fails."""
    (command,) = re.findall(r"^RUN (files=.*)", (FOLDER / "Dockerfile").read_text().replace("\\\n", ""), re.M)
    command = command.replace("/root /opt", str(tmp_path))
    file = tmp_path / "get_log_file_action.py"
    file.write_text("    shutil.move(path, log_paths[name])\n")
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    assert file.read_text() == "    shutil.copyfile(path, log_paths[name])\n"
    file.write_text("    os.rename(path, log_paths[name])\n")
    assert subprocess.run(["sh", "-c", command], check=False, capture_output=True).returncode != 0


def test_ports_are_this_machines_alone_and_the_database_has_none(compose: dict[str, Any]) -> None:
    ports = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert set(ports) == {"metadata", "ui"}
    assert [one for name in ports for one in ports[name] if not one.startswith("127.0.0.1:")] == []


def test_records_are_mounted_at_their_own_path_and_the_database_outlives_its_container(compose: dict[str, Any]) -> None:
    records, cards = compose["services"]["ui"]["volumes"]
    assert records["source"].startswith("${SFT_ROOT:?") and records["source"].endswith("}/.metaflow")
    assert records["target"] == "${SFT_ROOT}/.metaflow" and cards["target"] == "/root/.metaflow"
    for bind in (records, cards):
        assert "read_only" not in bind and bind["bind"]["create_host_path"] is False
    assert compose["services"]["database"]["volumes"] == ["database:/var/lib/postgresql/data"]
    assert "database" in compose["volumes"]


def test_each_service_starts_after_what_it_needs_is_healthy(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert [name for name, one in services.items() if name != "migration" and "healthcheck" not in one] == []
    assert services["migration"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    for name in ("metadata", "ui"):
        assert services[name]["depends_on"] == {"migration": {"condition": "service_completed_successfully"}}
        (port,) = services[name]["ports"]
        assert f":{port.rpartition(':')[2]}/ping" in services[name]["healthcheck"]["test"][-1]
    databases = [services[name]["environment"] for name in ("migration", "metadata", "ui")]
    told = {name: services["database"]["environment"][f"POSTGRES_{name}"] for name in ("USER", "PASSWORD", "DB")}
    for one in databases:
        assert one["MF_METADATA_DB_HOST"] == "database"
        assert told == {
            "USER": one["MF_METADATA_DB_USER"],
            "PASSWORD": one["MF_METADATA_DB_PSWD"],
            "DB": one["MF_METADATA_DB_NAME"],
        }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_shows_in_this_ui_and_its_names_in_any(recipe: Path, compose: dict[str, Any]) -> None:
    limit = int(compose["services"]["ui"]["environment"]["MAX_PROCESSABLE_S3_ARTIFACT_SIZE_KB"]) * 1024
    assert _size(parse_config(recipe.read_text())) < limit / 4
    loaded = load_recipe(recipe)
    assert _size(loaded.sources) < UI_LIMIT and _size(loaded.tasks) < UI_LIMIT


def test_make_ui_tells_the_folder_that_compose_asks_for() -> None:
    done = subprocess.run(["make", "--dry-run", "ui"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"SFT_ROOT='{ROOT}' docker compose --file deploy/metaflow-ui/compose.yaml" in done.stdout
    assert "mkdir -p .metaflow" in done.stdout


def test_variables_of_its_readme_are_metaflows() -> None:
    import metaflow.metaflow_config as config

    names = set(re.findall(r"METAFLOW_([A-Z_]+)", (FOLDER / "README.md").read_text()))
    assert {"DEFAULT_METADATA", "SERVICE_URL", "UI_URL"} <= names
    assert [name for name in sorted(names) if not hasattr(config, name)] == []


def _size(artifact: Any) -> int:
    """As Metaflow stores it."""
    return len(pickle.dumps(artifact, protocol=4))
