"""The flow as it was when each task was evaluated in a step of its own: it records runs of that shape."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# It sets what Metaflow reads when it is imported, so it comes first.
from flows import sft_flow
from flows.sft_flow import card, catch, current, step


class SFTFlow(sft_flow.SFTFlow):
    @step
    def fan_out(self):
        from steps.train import checkpoint_of

        pinned = self.pinned
        stage, part = checkpoint_of(pinned, "tuned")
        self.delivered = self.ensure(stage, pinned, **part)
        self.tasks = pinned.recipe.scored
        self.next(self.evaluate, foreach="tasks")

    @catch(var="failure")
    @card(type="blank", id="scores")
    @step
    def evaluate(self):
        from steps.cards import task
        from steps.cards.pieces import traceback_on
        from steps.scored import scoring_stage

        self.task = self.input
        with traceback_on(current.card):
            scorings = {model: scoring_stage(model, self.task) for model in self.pinned.recipe.models}
            self.evaluated = {
                model: self.ensure(stage, self.pinned, **part) for model, (stage, part) in scorings.items()
            }
            refs = {model: self.ref(address) for model, address in self.evaluated.items()}
            current.card.extend(task.card(self.store, refs))
        self.next(self.report)


if __name__ == "__main__":
    SFTFlow()
