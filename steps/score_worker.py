"""The process that scores for steps/outcomes.py: it does one order after another, and ends with its parent."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Connection

from sft_core.die_with_parent import die_with_parent
from sft_core.evaluate.loading import is_device_sound, keeping_a_model
from sft_core.pins.pinned import PinnedRecipe
from sft_core.report.shown import log_as_text
from sft_core.store.store import Store
from steps.colour import errors_as_text
from steps.evaluate import EVALUATED, measure_ahead
from steps.outcomes import Order, Outcome
from steps.scored import scoring_stage

log = logging.getLogger(__name__)


def main() -> None:
    end, started_by = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(started_by)
    os.set_inheritable(end, False)
    log_as_text(logging.INFO)
    pipe = Connection(end)
    try:
        pinned = pickle.loads(pipe.recv_bytes())
        store = Store(pinned.recipe.runtime.store)
        with keeping_a_model():
            while is_device_sound():
                order = pickle.loads(pipe.recv_bytes())
                pipe.send_bytes(b"")
                pipe.send_bytes(pickle.dumps(_run(store, pinned, order)))
    except EOFError:
        return  # the parent has no more orders


def _run(store: Store, pinned: PinnedRecipe, order: Order) -> Outcome | None:
    stage, part = scoring_stage(*order.scoring)
    try:
        with errors_as_text():
            if order.is_ahead:
                assert stage is EVALUATED, "lm-eval's tasks are transformers'"
                measure_ahead(store, pinned, part)
                return None
            return Outcome(order.scoring, str(store.ensure(stage, pinned, **part)))
    except Exception as error:
        # Catch it: one task's failure must not stop the others. Keep text only: the error holds on to the model.
        text = traceback.format_exc()
        log.error("model=%s task=%s status=failed\n%s", *order.scoring, text)
        return Outcome(order.scoring, reason=str(error) or type(error).__name__, traceback=text)


if __name__ == "__main__":
    main()
