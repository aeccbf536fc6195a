"""The flow as it was when each task was evaluated in a step of its own, and steps had other names.

It records runs of that shape.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# It sets what Metaflow reads when it is imported, so it comes first.
from flows import sft_flow
from flows.sft_flow import asks, card, catch, current, step


class SFTFlow(sft_flow.SFTFlow):
    to_nodes = train_on_nodes = join_nodes = evaluate_all = None

    @step
    def pack(self):
        pinned = self.pinned
        from steps.pack import PACKED

        self.packed = self.ensure(PACKED, pinned)
        self.num_rounds, self.rounds_left = 0, len(self.progress.rounds)
        self.next(self.train)

    @asks("train")
    @card(type="blank", id="training", refresh_interval=2)
    @step
    def train(self):
        self.train_round()
        self.next(self.fan_out)

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
