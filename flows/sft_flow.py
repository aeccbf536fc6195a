"""From raw chat data to a scored checkpoint.

    python flows/sft_flow.py run
    python flows/sft_flow.py --config recipe configs/smollm2-135m.yaml run
    python flows/sft_flow.py run --limit 200 --set training.learning_rate=1e-3
    python flows/sft_flow.py card view train

Each step builds its output unless the store has it already, fills its card, and names the next step.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("METAFLOW_USER", os.environ.get("USER") or "sft")  # Metaflow does not start without a name
os.environ.setdefault("METAFLOW_RUN_MAX_WORKERS", "2")  # parallel tasks share the machine's cores
os.environ.setdefault("METAFLOW_RESUME_MAX_WORKERS", os.environ["METAFLOW_RUN_MAX_WORKERS"])  # a resume runs as many
os.environ.setdefault("METAFLOW_RUN_MAX_NUM_SPLITS", "1000")  # sources of a recipe, or its tasks; Metaflow stops at 100
os.environ.setdefault("METAFLOW_RESUME_MAX_NUM_SPLITS", os.environ["METAFLOW_RUN_MAX_NUM_SPLITS"])
os.environ.setdefault("SFT_STARTED_BY", str(os.getpid()))  # the scheduler's pid: its tasks end with it
os.environ.setdefault("TQDM_DISABLE", "1")  # a task's log is no terminal
if sys.stdout.isatty():
    os.environ.setdefault("TTY_COMPATIBLE", "1")  # but this one is shown in a terminal, so allow colours

from metaflow import (  # noqa: E402
    Config,
    FlowSpec,
    Parameter,
    card,
    catch,
    config_expr,
    current,
    package_sources,
    parallel,
    resources,
    step,
)

from sft_core.report.shown import shown  # noqa: E402
from steps.cards.offline import fetch_nothing  # noqa: E402
from steps.runs.recipes import effective, open_store, parse_config  # noqa: E402
from steps.runs.service import check_service  # noqa: E402
from steps.runs.stopping import stop_gently  # noqa: E402

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def asks(work):
    """The decorator with the recipe's runtime.resources for this kind of work, which a cluster reads."""
    amounts = ("cpu", "memory", "gpu", "shared_memory")
    return resources(**{name: config_expr(f"recipe.runtime.resources.{work}.{name}") for name in amounts})


@package_sources(["../steps", "../sft_core", "../configs"], suffixes=[".py", ".yaml", ".jinja"])
class SFTFlow(FlowSpec):
    """foreach source: download → render → tokenize; mix → pack → train ⟲; foreach share: evaluate; report."""

    recipe = Config("recipe", default=QUICKSTART, parser=parse_config, help="the recipe's YAML file")
    limit = Parameter("limit", type=int, default=None, help="only the first rows of each source: a smoke run")
    set = Parameter("set", type=str, multiple=True, default=None, help="override, as training.learning_rate=1e-5")

    @step
    def start(self):
        """Pin the commits and digests of the recipe's names, and refuse bad input before any work."""
        from steps.colour import errors_as_text
        from steps.runs.tags import tag_run
        from steps.start import prepare

        recipe = effective(self.recipe, self.set, self.limit)
        tag_run(f"{current.flow_name}/{current.run_id}", recipe)
        with errors_as_text():
            self.pins = prepare(recipe).pins
        self.recipe_name, self.sources = recipe.name, recipe.sources
        self.next(self.download, foreach="sources")

    @asks("data")
    @step
    def download(self):
        """The source's rows as canonical conversations."""
        from steps.download import CONVERSATIONS

        self.source = self.input
        self.conversations = self.ensure(CONVERSATIONS, self.pinned, source=self.source)
        self.next(self.render)

    @asks("data")
    @step
    def render(self):
        """Conversations as text, with the spans that are trained."""
        from steps.render import RENDERED

        self.rendered = self.ensure(RENDERED, self.pinned, source=self.source)
        self.next(self.tokenize)

    @asks("data")
    @card(type="blank", id="tokens")
    @step
    def tokenize(self):
        """Text as Arrow shards of token ids and a trained mask."""
        from steps.cards import tokens
        from steps.tokenize import TOKENS

        self.tokens = self.ensure(TOKENS, self.pinned, source=self.source)
        current.card.extend(tokens.card(self.store, self.ref(self.tokens)))
        self.next(self.mix)

    @asks("data")
    @card(type="blank", id="mixture")
    @step
    def mix(self, inputs):
        """Choose the rows to train on from each source; remove duplicates and report prompts if the recipe says so."""
        from steps.cards import mixture
        from steps.cards.pieces import of_phase
        from steps.mix import MIXTURE
        from steps.report_prompts import check_report_prompts, count_report_prompts

        self.merge_artifacts(inputs, include=["pins", "recipe_name", "sources"])
        pinned = self.pinned
        check_report_prompts(count_report_prompts(self.store, pinned), pinned)
        for phase in pinned.recipe.phases:
            self.mixture = self.ensure(MIXTURE, pinned, **pinned.part_of(phase))
            current.card.extend(of_phase(pinned, phase, mixture.card(self.store, self.ref(self.mixture))))
        self.next(self.pack)

    @asks("data")
    @card(type="blank", id="packs")
    @step
    def pack(self):
        """Rows into packs, first-fit-decreasing."""
        from steps.cards import packs
        from steps.cards.pieces import of_phase
        from steps.pack import PACKED
        from steps.search import place
        from steps.selection import SELECTION

        pinned = self.pinned
        for phase in pinned.recipe.phases:
            self.packed = self.ensure(PACKED, pinned, **pinned.part_of(phase))
            current.card.extend(of_phase(pinned, phase, packs.card(self.store, self.ref(self.packed))))
            if pinned.recipe.selection_rows(phase) is not None:
                self.selection = self.ensure(SELECTION, pinned, **pinned.part_of(phase))
        known = self.progress
        self.num_rounds, self.rounds_left = 0, len(known.rounds)
        self.place = place(self.store, known)
        self.next({"here": self.train, "nodes": self.to_nodes}, condition="place")

    @asks("train")
    @card(type="blank", id="training", refresh_interval=2)
    @step
    def train(self):
        """Train the next round. Phases follow one another; a phase with a search has as many rounds as it asks for."""
        self.train_round()
        self.verdict = "again" if self.rounds_left else "done"
        self.next({"again": self.train, "done": self.evaluate_all}, condition="verdict")

    @step
    def to_nodes(self):
        """Start the gang of nodes. Metaflow does not allow a condition and a gang in one step."""
        self.next(self.train_on_nodes, num_parallel=self.pinned.recipe.runtime.num_nodes)

    @asks("train")
    @card(type="blank", id="training", refresh_interval=2)
    @parallel
    @step
    def train_on_nodes(self):
        """All rounds of training, each on several nodes. The first one decides and stores, the others join it."""
        from steps.nodes import meet_other_nodes

        meet_other_nodes(current.parallel, f"{current.run_id}/{current.retry_count}")
        while self.rounds_left:
            self.train_round()
        self.next(self.join_nodes)

    @step
    def join_nodes(self, inputs):
        """Join the gang's tasks."""
        kept = ["pins", "recipe_name", "trained", "num_rounds"]
        self.merge_artifacts(inputs, include=kept)
        self.next(self.evaluate_all)

    @step
    def evaluate_all(self):
        """Divide the tasks into shares. Metaflow does not allow a condition (in `train`) and a foreach in one step."""
        from steps.task_shares import shares_of
        from steps.train import checkpoint_of

        pinned = self.pinned
        for phase in pinned.recipe.phases:
            stage, part = checkpoint_of(pinned, phase)
            self.delivered = self.ensure(stage, pinned, **part)
        self.shares = shares_of(pinned.recipe)
        self.next(self.evaluate, foreach="shares")

    @asks("evaluate")
    @catch(var="failure")  # once its retries are used up: the other tasks are scored, and `end` fails
    @card(type="blank", id="scores", refresh_interval=2)
    @step
    def evaluate(self):
        """The start model and each phase's on a share of the tasks, each loaded once. A task that fails fails alone."""
        from sft_core.die_with_parent import die_with_parent
        from steps import task_shares
        from steps.cards.pieces import traceback_on

        die_with_parent()  # a killed scheduler must not leave a model on a GPU
        self.share = task_shares.tasks_of(self.input)
        with traceback_on(current.card):
            scored = task_shares.score(self.store, self.pinned, self.share, self.index, current.card)
        self.evaluated, self.failures = scored.evaluated, scored.failures
        if self.failures:
            raise RuntimeError(f"not scored: {', '.join(self.failures)}")  # a retry scores these again
        self.next(self.report)

    @card(type="blank", id="report")
    @step
    def report(self, inputs):
        """The table of scores, and the checkpoint with its model card; on the hub where the recipe says so."""
        from steps.cards import report
        from steps.release import PUSHED, RELEASED
        from steps.report import REPORT
        from steps.scored import not_scored, reasons_of

        self.merge_artifacts(inputs, include=["pins", "recipe_name"])
        pinned = self.pinned
        self.failed = not_scored(self.store, pinned, reasons_of(inputs))
        part = {"without": [*self.failed]} if self.failed else {}
        self.scored = self.ensure(REPORT, pinned, **part)
        manifest = self.store.manifest(self.ref(self.scored))
        self.scores, self.thinking = manifest["counts"]["scores"], manifest["counts"]["thinking"]
        current.card.extend(report.card(self.store, self.ref(self.scored)))
        self.released = self.ensure(RELEASED, pinned, **part)
        self.checkpoint = str(self.store.path(self.ref(self.released)) / "model")
        self.hub_url = None
        if pinned.recipe.hub and not self.failed:  # publish only complete scores
            self.pushed = self.ensure(PUSHED, pinned)
            self.hub_url = self.store.manifest(self.ref(self.pushed))["counts"]["url"]
        self.next(self.end)

    @step
    def end(self):
        """Say what came out, and where it is. Fails where tasks are not scored."""
        from steps.report import failures, summary

        print(summary(self.scores, self.thinking, self.checkpoint, self.hub_url))
        if self.failed:
            raise RuntimeError(failures(self.failed))

    # What the steps share; no artifacts.

    def train_round(self):
        """Ensures what the next round trains, with a live card; on a node that is not the first, joins its training."""
        from sft_core.die_with_parent import die_with_parent
        from steps import nodes, train
        from steps.cards import search, training

        known = self.progress
        pinned, part = known.pinned, known.rounds[self.num_rounds]
        train.check_machine(self.store, pinned, part)
        die_with_parent()  # a killed scheduler must not leave a trainer behind
        if current.get("parallel") and current.parallel.node_index > 0:
            self.trained = nodes.join_round(self.store, pinned, part)
        else:
            with training.live_card(self.store, pinned, part, current.card):
                self.trained = self.ensure(train.TRAINED, pinned, **part)
        known = self.progress  # read again: a search may have decided on further rounds
        self.num_rounds += 1
        self.rounds_left = len(known.rounds) - self.num_rounds
        current.card.extend(search.card(known, pinned.phase_name(part)))
        current.card.extend(training.card(self.store.path(self.ref(self.trained), "logs/*")))

    @property
    def progress(self):
        """The rounds of training that are decided so far, read from the store."""
        from steps.search import progress

        return progress(self.store, self.without_rounds)

    @property
    def pinned(self):
        """The recipe with its pins. With a search each access reads its rounds from the store, so access it once."""
        pinned = self.without_rounds
        return self.progress.pinned if pinned.recipe.has_search else pinned

    @property
    def without_rounds(self):
        from sft_core.pins.pinned import PinnedRecipe

        return PinnedRecipe(effective(self.recipe, self.set, self.limit), self.pins)

    @property
    def store(self):
        return open_store(effective(self.recipe, self.set, self.limit).runtime.store)

    def ensure(self, stage, pinned, **part):
        """The output's address as text, which the UI shows."""
        from steps.colour import errors_as_text

        with errors_as_text():
            return str(self.store.ensure(stage, pinned, **part))

    def ref(self, address):
        from sft_core.store.ref import Ref

        return Ref(*address.split("/"))


if __name__ == "__main__":
    try:
        check_service(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"    {shown(str(error))}")
    stop_gently(sys.argv[1:])
    fetch_nothing()  # a process of this file renders the cards
    SFTFlow()
