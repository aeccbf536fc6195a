"""A flow of 101 small tasks in the environment that the real flow's file sets up. JOINED names a file that the join
wants."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# It sets what Metaflow reads when it is imported, so it comes first.
from flows.sft_flow import FlowSpec, step

NUM_SOURCES = 101  # one more than Metaflow lets a foreach have by itself


class ManyFlow(FlowSpec):
    @step
    def start(self):
        self.sources = [*range(NUM_SOURCES)]
        self.next(self.download, foreach="sources")

    @step
    def download(self):
        self.next(self.mix)

    @step
    def mix(self, inputs):
        assert Path(os.environ["JOINED"]).exists(), "the file is not there yet"
        self.num_sources = len([*inputs])
        self.next(self.end)

    @step
    def end(self):
        print(f"joined {self.num_sources} sources")


if __name__ == "__main__":
    ManyFlow()
