"""A page as its reader sees it: headless Chromium draws it, and tells its text, tables, charts and errors.

with Browser() as browser:
    page = browser.open(card)  # a file, or an address; drawn before it returns
    page = browser.card(components)  # by Metaflow's own blank card, without a run
    assert page.errors == [] and page.tables[0][0] == ["task", "metric", "n", "base", "tuned", "stderr"]
    browser.picture(card, Path("card.png"), width=1000)

Tests take the fixture `browser`, which is one for all of them and skips where there is no Chromium.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import websocket

from sft_core.die_with_parent import die_with_parent

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 60
STILL_S = 0.4  # a page that says the same for so long is drawn


@dataclass(frozen=True)
class Chart:
    """A Vega chart: what it was given, and what of it is on the page."""

    title: str
    axes: list[str]  # their titles
    labels: list[str]  # along the axes
    legend: list[str]  # titles and entries
    marks: dict[str, list[str]]  # drawn, by kind (line, symbol, rect, ...): what Vega tells a screen reader of each
    width: int
    height: int
    spec: dict[str, Any]  # as the card holds it; empty where another chart of the card was refused

    @property
    def values(self) -> list[dict[str, Any]]:
        """The rows of its own data."""
        return self.spec.get("data", {}).get("values", [])


@dataclass(frozen=True)
class Page:
    text: str
    headings: list[str]
    tables: list[list[list[str]]]  # each a list of rows, the header first
    charts: list[Chart]
    frames: list[str]  # addresses of the pages inside it: a card server shows a card in one
    acting: list[str]  # the beginnings of elements that load, lead to another place, or run
    width: int  # of what it holds: more than the window's where the page has to be scrolled sideways
    height: int
    errors: list[str] = field(default_factory=list)  # exceptions, console errors, what this machine did not serve
    warnings: list[str] = field(default_factory=list)  # Vega's are here
    requests: list[str] = field(default_factory=list)  # addresses asked for; other machines are not reached


def executable() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One headless Chromium with a profile of its own; both are gone when the block is left or this process ends."""

    def __init__(self, width: int = 1100, height: int = 900):
        self.width, self.height = width, height

    def __enter__(self) -> Self:
        program = executable()
        assert program, f"none of {', '.join(NAMES)} is installed"
        self._ending = contextlib.ExitStack()
        with contextlib.ExitStack() as failing:
            profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
            failing.enter_context(profile)
            self._process = _started(program, Path(profile.name))
            failing.callback(_end, self._process)
            self._port = _port(Path(profile.name), self._process)
            self._ending = failing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    @property
    def process_id(self) -> int:
        return self._process.pid

    def open(self, address: str | Path, *, width: int | None = None, contains: str = "", script: str = "") -> Page:
        """The page once it stays as it is, its charts are drawn, and its text holds `contains`. script: run in it."""
        with self._tab(width) as tab:
            return tab.load(_url(address), contains, script)

    def card(self, components: list[Any], *, width: int | None = None, script: str = "") -> Page:
        """What `current.card.extend(components)` shows on a blank card. What its place cuts off is an error."""
        from metaflow.plugins.cards.card_modules.basic import BlankCard

        rendered = [component.render() for component in components]
        html = BlankCard().render(SimpleNamespace(pathspec="Flow/1/step/1"), rendered)
        with tempfile.TemporaryDirectory(prefix="card-") as folder:
            path = Path(folder) / "card.html"
            path.write_text(html)
            page = self.open(path, width=width, script=script)
        if page.width > (width or self.width):
            page.errors.append(f"{page.width} pixels wide, in a window of {width or self.width}")
        return page

    def picture(
        self, address: str | Path, path: Path, *, width: int | None = None, height: int | None = None, script: str = ""
    ) -> Page:
        """Saves the page as PNG from its top: all of it, or at most `height` pixels. script: run in it before."""
        with self._tab(width) as tab:
            page = tab.load(_url(address), "", script)
            area = {"x": 0, "y": 0, "width": width or self.width, "height": min(page.height, height or page.height)}
            told = tab.ask("Page.captureScreenshot", clip={**area, "scale": 1}, captureBeyondViewport=True)
            path.write_bytes(base64.b64decode(told["data"]))
            return page

    @contextlib.contextmanager
    def _tab(self, width: int | None) -> Any:
        new = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/new?about:blank", method="PUT")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the browser is here: no proxy
        with opener.open(new, timeout=TIMEOUT_S) as answer:
            target = json.load(answer)
        tab = _Tab(target["webSocketDebuggerUrl"])
        try:
            size = {"width": width or self.width, "height": self.height}
            tab.ask("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
            yield tab
        finally:
            tab.close()
            with opener.open(f"http://127.0.0.1:{self._port}/json/close/{target['id']}", timeout=TIMEOUT_S):
                pass


class _Tab:
    """A tab over the DevTools protocol: commands, and the events that come between their answers."""

    def __init__(self, address: str):
        self._socket = websocket.create_connection(
            address, timeout=TIMEOUT_S, suppress_origin=True, http_no_proxy=["127.0.0.1"]
        )
        self._number = 0
        self._errors: list[str] = []
        self._warnings: list[str] = []
        self._requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self._socket.close()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def load(self, url: str, contains: str, script: str = "") -> Page:
        told = self.ask("Page.navigate", url=url)
        assert "errorText" not in told, f"{url}: {told['errorText']}"
        page = self._drawn(url, contains)
        if script:
            self._evaluate(script)
            page = self._drawn(url, contains)
        return page

    def _drawn(self, url: str, contains: str) -> Page:
        seen, since, deadline = None, time.monotonic(), time.monotonic() + TIMEOUT_S
        while True:
            now = self._evaluate(f"({LOOK})()")
            if now != seen:
                seen, since = now, time.monotonic()
            is_still = time.monotonic() - since >= STILL_S and now["ready"] and contains in now["text"]
            # A chart that Vega refuses is never drawn: its error is what there is to see.
            if is_still and (len(now["charts"]) >= len(now["specs"]) or self._errors):
                return self._page(now)
            assert time.monotonic() < deadline, (
                f"{url} is not drawn after {TIMEOUT_S} s: {len(now['charts'])} of {len(now['specs'])} charts, "
                f"{contains!r} {'is' if contains in now['text'] else 'is not'} there; its text: {now['text'][:500]!r}"
            )
            time.sleep(0.05)

    def _page(self, now: dict[str, Any]) -> Page:
        specs, charts = now.pop("specs"), now.pop("charts")
        if len(specs) != len(charts):
            specs = [{}] * len(charts)
        charts = [Chart(**chart, spec=spec) for chart, spec in zip(charts, specs, strict=True)]
        del now["ready"]
        return Page(**now, charts=charts, errors=self._errors, warnings=self._warnings, requests=self._requests)

    def _evaluate(self, expression: str) -> Any:
        told = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def _note(self, event: str | None, told: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self._errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert", "warning"):
            line = " ".join(str(one.get("value", one.get("description", ""))) for one in told["args"])
            # A card warns of the exception by which Vega refuses a chart.
            is_error = told["type"] != "warning" or any(one.get("subtype") == "error" for one in told["args"])
            (self._errors if is_error else self._warnings).append(line)
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            entry = told["entry"]
            if entry["source"] == "network" and not _is_here(entry.get("url", "")):
                return  # it is among the requests
            into = self._warnings if entry["level"] == "warning" else self._errors
            into.append(f"{entry['text']} {entry.get('url', '')}".strip())
        elif event == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
            self._requests.append(told["request"]["url"])


# Vega draws SVG whose groups name their role, and whose marks carry a description for screen readers.
LOOK = r"""() => {
    const texts = (root, selector) => [...root.querySelectorAll(selector)].map(one => one.textContent.trim());
    const cells = row => [...row.cells].map(cell => cell.innerText.trim());
    const specs = [], visit = part => {
        if (part === null || typeof part !== "object") return;
        if (part.type === "vegaChart") specs.push(part.spec);
        else Object.values(part).forEach(visit);
    };
    for (const data of Object.values(window.__MF_DATA__ || {}))
        visit(JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(data), c => c.charCodeAt(0)))));
    const chart = svg => {
        const marks = {};
        for (const group of svg.querySelectorAll("g[class*=' role-mark']")) {
            const kind = group.getAttribute("class").match(/mark-(\w+)/)[1];
            const drawn = [...group.children].filter(one => one.tagName !== "g" && one.getAttribute("d") !== "");
            if (drawn.length) (marks[kind] ||= []).push(...drawn.map(one => one.getAttribute("aria-label") || ""));
        }
        return {
            title: texts(svg, ".role-title-text text").join(" "),
            axes: texts(svg, ".role-axis-title text"),
            labels: texts(svg, ".role-axis-label text"),
            legend: texts(svg, ".role-legend-title text, .role-legend-label text"),
            marks,
            width: svg.clientWidth,
            height: svg.clientHeight,
        };
    };
    // What a scroll bar would have to bring into sight: of a table that is wider than its place nobody sees the end.
    const clipped = one => getComputedStyle(one).overflowX === "visible" ? 0 : one.scrollWidth - one.clientWidth;
    const ACTING = "a, area, img, picture, script:not(body > script), iframe, object, embed, link, meta, base, "
        + "form:not(.vega-bindings), input, button[formaction], video, audio, source, track, image, use, "
        + "foreignObject, [onload], [onerror], [onclick], [onmouseover], [srcset], [background]";
    const body = document.body;
    const hidden = body ? Math.max(0, ...[...body.querySelectorAll("*")].map(clipped)) : 0;
    if (!body) return {ready: false, text: "", charts: [], specs, acting: []};
    return {
        ready: document.readyState === "complete" && (!window.mfCardDataId || !!body.querySelector("[data-component]")),
        text: body.innerText,
        headings: texts(body, "h1, h2, h3, h4"),
        tables: [...body.querySelectorAll("table")].map(table => [...table.rows].map(cells)),
        charts: [...body.querySelectorAll(".vega-embed svg.marks")].map(chart),
        specs,
        acting: [...body.querySelectorAll(ACTING)].map(one => one.outerHTML.slice(0, 200)),
        frames: [...body.querySelectorAll("iframe")].map(frame => frame.src),
        width: document.documentElement.scrollWidth + hidden,
        height: document.documentElement.scrollHeight,
    };
}"""


def _is_here(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname in (None, "127.0.0.1", "localhost")


def _url(address: str | Path) -> str:
    return address.resolve().as_uri() if isinstance(address, Path) else address


def _started(program: str, profile: Path) -> subprocess.Popen[bytes]:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
    # It looks for updates, and asks its maker about what it sees, unless it is told not to.
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"]
    # A page looks the same with and without a network: every name is unknown.
    quiet.append("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost")
    return subprocess.Popen(
        [program, *flags, *quiet, f"--user-data-dir={profile}", "--hide-scrollbars", "about:blank"],
        env={**os.environ, "HOME": str(profile)},  # crash reports and caches go there as well
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(profile / "stderr.txt").open("wb"),
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _port(profile: Path, process: subprocess.Popen[bytes]) -> int:
    """Chromium writes the port it took into its profile."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            if lines := (profile / "DevToolsActivePort").read_text().splitlines():
                return int(lines[0])
        output = (profile / "stderr.txt").read_text(errors="replace")[-1000:]
        assert process.poll() is None and time.monotonic() < deadline, f"Chromium does not start: {output}"
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its renderers are of its group
    process.wait(TIMEOUT_S)
    deadline = time.monotonic() + 5
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:  # a renderer that is still ending writes into the profile
            os.killpg(process.pid, 0)
            time.sleep(0.01)
