"""A flow whose artifacts, cards and errors hold the texts of HOSTILE_TEXTS (JSON)."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metaflow import FlowSpec, card, catch, current, step

from steps.cards.offline import fetch_nothing


class HostileFlow(FlowSpec):
    @card(type="default", id="artifacts")
    @card(type="blank", id="live", refresh_interval=1)
    @step
    def start(self):
        """Keeps artifacts, and draws a card while it runs."""
        from steps.cards.pieces import heading, redraw, table

        self.texts = json.loads(os.environ["HOSTILE_TEXTS"])
        self.first, self.by_name = self.texts[0], {text: {"inside": [text]} for text in self.texts}
        for number, text in enumerate(self.texts, start=1):
            setattr(self, f"text_{number}", text)
        redraw(current.card["live"], [heading(self.first), table(("texts",), [(text,) for text in self.texts])])
        self.next(self.fail)

    @catch(var="failure")
    @card(type="default", id="artifacts")
    @step
    def fail(self):
        """Fails with each of the texts."""
        from steps.colour import errors_as_text

        with errors_as_text():
            raise ValueError("\n".join(json.loads(os.environ["HOSTILE_TEXTS"])))
        self.next(self.end)

    @step
    def end(self):
        """Says what was caught."""
        print(self.failure.exception)


if __name__ == "__main__":
    fetch_nothing()
    HostileFlow()
