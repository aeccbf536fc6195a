"""What the pipeline costs when there is nothing to do: the quickstart with every output in the store, beside an
empty Metaflow flow of the same shape (as many tasks, cards on the same steps).

    python benchmarks/warm_run.py

Runs the quickstart first when its outputs are not there yet. Prints a table, and one JSON object as its last line.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS = 3
EMPTY_FLOW = """
from metaflow import FlowSpec, card, current, step
from metaflow.cards import Markdown

class EmptyFlow(FlowSpec):
    @step
    def start(self):
        self.items = list(range({sources}))
        self.next(self.download, foreach="items")
    @step
    def download(self):
        self.next(self.render)
    @step
    def render(self):
        self.next(self.tokenize)
    @card(type="blank")
    @step
    def tokenize(self):
        current.card.append(Markdown("x"))
        self.next(self.mix)
    @card(type="blank")
    @step
    def mix(self, inputs):
        current.card.append(Markdown("x"))
        self.next(self.pack)
    @card(type="blank")
    @step
    def pack(self):
        current.card.append(Markdown("x"))
        self.next(self.train)
    @card(type="blank")
    @step
    def train(self):
        current.card.append(Markdown("x"))
        self.next(self.fan_out)
    @step
    def fan_out(self):
        self.items = list(range({tasks}))
        self.next(self.evaluate, foreach="items")
    @card(type="blank")
    @step
    def evaluate(self):
        current.card.append(Markdown("x"))
        self.next(self.report)
    @card(type="blank")
    @step
    def report(self, inputs):
        current.card.append(Markdown("x"))
        self.next(self.end)
    @step
    def end(self):
        pass

if __name__ == "__main__":
    EmptyFlow()
"""


def main() -> None:
    from sft_core.recipe import load_recipe
    from sft_core.report.tables import text_table

    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml")
    flow = [sys.executable, str(ROOT / "flows" / "sft_flow.py"), "run"]
    timed(flow, ROOT)  # the first fills the store
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty_flow.py"
        shape = {"{sources}": len(recipe.sources), "{tasks}": len(recipe.tasks)}
        empty.write_text(functools.reduce(lambda text, name: text.replace(name, str(shape[name])), shape, EMPTY_FLOW))
        # In turn, so that a machine whose speed drifts is fair to both.
        pairs = [(timed(flow, ROOT), timed([sys.executable, str(empty), "run"], Path(folder))) for _ in range(RUNS)]
    warm, nothing = (sorted(pair[side] for pair in pairs)[RUNS // 2] for side in (0, 1))
    rows = [("quickstart, all in the store", warm), ("empty flow of its shape", nothing)]
    print(text_table(("flow", f"seconds (median of {RUNS})"), rows))
    print(
        json.dumps({"warm_run_s": round(warm, 1), "empty_flow_s": round(nothing, 1), "ratio": round(warm / nothing, 2)})
    )


def timed(command: list[str], folder: Path) -> float:
    environment = {"METAFLOW_USER": "benchmark", "METAFLOW_RUN_MAX_WORKERS": "2"}
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment | os.environ, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
