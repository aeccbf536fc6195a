"""What Metaflow keeps and shows of hostile data: artifacts, errors and cards of a real run, in a browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sft_core.report.shown import shown
from tests.browser import Browser
from tests.flows.conftest import Project
from tests.hostile import listener

FLOW = Path(__file__).with_name("flow_of_hostile_text.py")


@pytest.mark.long
def test_artifacts_errors_and_cards_of_a_run_are_text_and_fetch_nothing(tmp_path: Path, browser: Browser) -> None:
    project = Project(tmp_path)
    with listener() as heard:
        texts = heard.texts()
        project.settings = {"HOSTILE_TEXTS": json.dumps(texts), "METAFLOW_USER": "sft"}
        done = subprocess.run(
            [sys.executable, str(FLOW), "--no-pylint", "run"],
            cwd=tmp_path,
            env=project.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        # Metaflow prints the traceback of the error, and `end` what is kept of it.
        log = done.stdout + done.stderr
        assert not re.search("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]|\x1b\\[31mred", log)
        assert log.count("␛[31mred␇") >= 2
        pages = {page.name.split("-")[1]: page for page in tmp_path.glob(".metaflow/mf.cards/**/start/**/*.html")}
        assert sorted(pages) == ["artifacts", "live"]
        pages["failed"], *_ = tmp_path.glob(".metaflow/mf.cards/**/fail/**/*.html")
        for name, path in pages.items():
            page = browser.open(path)
            assert page.errors == [], name
            assert all(address.startswith(("file:", "data:")) for address in page.requests), page.requests
            assert page.acting == [] and "<img src=http:" in page.text, name
        live = " ".join(browser.open(pages["live"]).text.split())
        assert all(" ".join(shown(text).split()) in live for text in texts)
        assert heard.asked == []
