"""The documents' pictures of cards: `python docs/pictures.py [RUN]`, in the folder the flow ran in, after a run.

Headless Chromium takes the top of each step's card, and the card server, from the newest finished run without a search
(or the one named), and from the newest one with a search the card of its last round of training.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser import Browser, Page  # noqa: E402

FLOW = ROOT / "flows" / "sft_flow.py"
STEPS = ("tokenize", "mix", "pack", "train", "evaluate", "report")
MAX_BYTES, WIDTH = 500_000, 1100
MAX_HEIGHT = 3600  # pixels: the card of all tasks is some 8,000 high
TIMEOUT_S = 60
SHOW = """(() => {
    const menu = document.querySelector("select");
    menu.value = [...menu.options].find(option => option.text.startsWith("STEP/")).value;
    menu.dispatchEvent(new Event("change"));
})()"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", help="its id; by default the newest finished one without a search")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures", help="the folder of the pictures")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    finished = finished_runs()
    plain = [run for run in finished if run.id == arguments.run or (arguments.run is None and not searches(run))]
    if not plain:
        sys.exit(f"no {f'run {arguments.run}' if arguments.run else 'finished run'} is recorded in {Path.cwd()}")
    run = plain[0]
    with tempfile.TemporaryDirectory() as folder, Browser(width=WIDTH, height=100) as browser:
        for step in STEPS:
            html = Path(folder) / f"{step}.html"
            html.write_text(card_html(max(run[step], key=number)))
            path = arguments.output / f"card-{step}.png"
            tell(path, browser.picture(html, path, height=MAX_HEIGHT))
        for searching in [run for run in finished if searches(run)][:1]:
            html = Path(folder) / "search.html"
            html.write_text(card_html(max(searching["train"], key=number)))
            path = arguments.output / "card-search.png"
            tell(path, browser.picture(html, path))
    with card_server(run.id) as url, Browser(width=WIDTH, height=700) as browser:
        path = arguments.output / "card-server.png"
        tell(path, browser.picture(url, path, script=SHOW.replace("STEP", "train")))


def finished_runs() -> list[Any]:
    """The newest first."""
    os.environ.setdefault("METAFLOW_USER", os.environ.get("USER") or "sft")
    from metaflow import Flow, namespace

    namespace(None)
    return sorted((run for run in Flow("SFTFlow") if run.successful), key=lambda run: run.created_at, reverse=True)


def searches(run: Any) -> bool:
    return any(tag.startswith("strategy:") for tag in run.user_tags)


def number(task: Any) -> int:
    return int(task.id)


def card_html(task: Any) -> str:
    from metaflow.cards import get_cards

    return get_cards(task)[0].get()


def tell(path: Path, page: Page) -> None:
    size = path.stat().st_size
    print(f"{path} {size // 1000} kB")
    if page.errors or size > MAX_BYTES or page.width > WIDTH:
        of = f"{size} bytes, at most {MAX_BYTES} are wanted; {page.width} pixels wide, at most {WIDTH}"
        sys.exit(f"{path}: {'; '.join(page.errors) or of}")


@contextlib.contextmanager
def card_server(run: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(FLOW), "--quiet", "card", "server", "--run-id", run, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the card server does not start: {' '.join(command)}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
