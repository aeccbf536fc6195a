"""What a training step does in a second, beside plain TRL; and what the pipeline around it costs when all is there.

    python benchmarks/training.py

Needs `make smollm2`. SmolLM2-135M is trained on the first rows of each source of configs/smollm2-135m.yaml, bf16
autocast over fp32 weights, two threads. Ours is the train stage as the flow runs it, and its speed is that of its log.
TRL is a plain SFTTrainer of the same conversations, template and settings, twice: padded, `--batch-size` conversations
a forward and as many forwards as make our steps, and packed by itself (bfd), one pack a forward as ours. Without flash
attention TRL packs all the same: positions that restart keep sdpa within a document, on both sides.

All train the same conversations for two epochs of as many steps; the first warms up and the second counts, in which
each side trains the same tokens (asserted). Trained tokens are those with a label. The sides take turns, each run in
a process of its own, loading and saving outside the time; the median of the rounds counts. On a CPU TRL makes logits
for all tokens and ours for the trained ones; on a GPU both make them for the trained ones: this lead is a CPU's.

The pipeline's overhead is the time of `python flows/sft_flow.py run`, the quickstart, with every output in the store,
beside an empty Metaflow flow of the same shape (as many tasks, cards on the same steps). The quickstart runs first
when its outputs are not there yet. Prints tables, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from trl import SFTConfig

    from sft_core.pins.pinned import PinnedRecipe
    from sft_core.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ROUNDS = 2
NUM_THREADS = 2
ROWS_OF_A_SOURCE, CAPACITY, PACKS_A_STEP = 7, 1024, 2
NUM_CONVERSATIONS, STEPS_AN_EPOCH = 63, 2
PADDED_A_STEP = 32  # conversations: as many steps as ours then has
LABELS = {
    "ours": "ours: FFD packs",
    "trl_packed": "TRL, packing=True (bfd)",
    "trl_padded": "TRL, padded batches",
}
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
        self.items = list(range({shares}))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch-size", type=int, choices=(1, 2, 4, 8, 16, 32), default=4, help="of padded TRL")
    parser.add_argument("--trl", nargs=4, metavar=("SIDE", "FORWARD", "ACCUMULATED", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(ROOT)  # to which the recipe's paths are relative
    if options.trl:
        side, *numbers = options.trl
        print(json.dumps(run_trl(side, *map(int, numbers))))
        return
    batch = {"trl_padded": (options.batch_size, PADDED_A_STEP // options.batch_size), "trl_packed": (1, PACKS_A_STEP)}
    runs = training_runs(options.rounds, batch)
    speeds = {side: statistics.median(one["speed"] for one in found) for side, found in runs.items()}
    warm_s, empty_s = warm_run(options.rounds)
    show(runs, speeds, warm_s, empty_s)
    print(
        json.dumps(
            {
                "ratio_vs_trl_padded": round(speeds["ours"] / speeds["trl_padded"], 2),
                "ratio_vs_trl_packed": round(speeds["ours"] / speeds["trl_packed"], 2),
                "overhead_s": round(warm_s, 1),
                "empty_flow_s": round(empty_s, 1),
                **{f"{side}_trained_tokens_per_s": round(speed, 1) for side, speed in speeds.items()},
            }
        )
    )


def show(runs: dict[str, list[dict[str, Any]]], speeds: dict[str, float], warm_s: float, empty_s: float) -> None:
    from sft_core.report.tables import text_table

    rows = [
        (LABELS[side], round(speed, 1), speeds["ours"] / speed, runs[side][0]["tokens"], runs[side][0]["in_forward"])
        for side, speed in speeds.items()
    ]
    header = ("the second epoch", "trained tokens/s", "ours is x", "tokens", "with padding")
    print(f"{NUM_CONVERSATIONS} conversations, {runs['ours'][0]['trained']} trained tokens on each side\n")
    print(text_table(header, rows))
    flows = [("quickstart, all in the store", warm_s), ("empty flow of its shape", empty_s)]
    print("\n" + text_table(("flow", "seconds"), flows))


# Training


def training_runs(rounds: int, batch: dict[str, tuple[int, int]]) -> dict[str, list[dict[str, Any]]]:
    """batch: of each of TRL's sides, rows a forward and forwards a step."""
    from tqdm import tqdm

    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in LABELS}
    for number, side in tqdm(list(itertools.product(range(rounds), LABELS)), disable=None, desc="training runs"):
        runs[side].append(run_ours(number) if side == "ours" else alone(side, batch[side], number))
    found = [one for of_side in runs.values() for one in of_side]
    assert len({(one["trained"], one["digest"]) for one in found}) == 1, "the sides trained on different tokens"
    # TRL tokenizes a whole text, where two newlines before an answer are two tokens; served, and in ours, they are one.
    tokens = {one["tokens"] for one in found}
    assert max(tokens) - min(tokens) <= NUM_CONVERSATIONS, f"the sides read different texts: {tokens} tokens"
    return runs


def recipe_of(seed: int, store: str) -> Recipe:
    from sft_core.recipe.parse import load_recipe

    changes = {
        "dataset_mixture.selection_share": 0,
        "dataset_mixture.report_share": 0,
        "packing.max_length": CAPACITY,
        "training.num_train_epochs": 2,
        "training.global_batch_size": PACKS_A_STEP,
        "training.seed": seed,
        "runtime.store": store,
        "runtime.num_threads": NUM_THREADS,
        "runtime.logging_steps": STEPS_AN_EPOCH,  # so the last line of the log is of the second epoch
        "runtime.save_steps": 1000,
    }
    overrides = tuple(f"{key}={value}" for key, value in changes.items())
    return load_recipe(ROOT / "configs" / "smollm2-135m.yaml", overrides=overrides, limit=ROWS_OF_A_SOURCE)


def run_ours(seed: int) -> dict[str, Any]:
    from sft_core.pins.pinned import pin
    from sft_core.store.store import Store
    from steps.cards.training import events
    from steps.pack import PACKED
    from steps.train import TRAINED

    with tempfile.TemporaryDirectory() as root:
        pinned, store = pin(recipe_of(seed, root)), Store(root)
        packs = store.ensure(PACKED, pinned)
        counts = store.manifest(packs)["counts"]
        assert counts["documents"] == NUM_CONVERSATIONS, f"{counts['documents']} conversations are packed"
        with contextlib.redirect_stdout(io.StringIO()):  # the ranks' output
            logged = events(store.path(store.ensure(TRAINED, pinned, round=0)))
        assert logged[-1]["step"] == 2 * STEPS_AN_EPOCH and logged[-2]["step"] == STEPS_AN_EPOCH
        return {
            "speed": logged[-1]["trained_tokens_per_s"],
            "tokens": counts["tokens"],
            "in_forward": counts["tokens"],
            **trained_of(packed_ids(store, pinned, store.path(packs))),
        }


def packed_ids(store: Any, pinned: PinnedRecipe, packs: Path) -> np.ndarray:
    """The trained ids of all documents of the plan: what a pass over the packs trains."""
    import numpy as np

    from sft_core.data.packing.plan import PackPlan
    from sft_core.data.shards.token_shards import TokenShards
    from steps.tokenize import TOKENS

    plan = PackPlan.read(packs)
    shards = [TokenShards(store.path(store.ensure(TOKENS, pinned, source=name))) for name in pinned.recipe.sources]
    rows = [shards[source][row].first(n) for source, row, n in zip(plan.source, plan.row, plan.num_tokens, strict=True)]
    return np.concatenate([row.input_ids[1:][row.trained[1:] == 1] for row in rows])


def trained_of(ids: np.ndarray) -> dict[str, Any]:
    import numpy as np

    return {"trained": len(ids), "digest": hashlib.sha256(np.sort(ids).astype(np.int64).tobytes()).hexdigest()}


def alone(side: str, batch: tuple[int, int], seed: int) -> dict[str, Any]:
    """TRL in a process of its own, with the environment that our ranks get."""
    from sft_core.train.launch import variables

    command = [sys.executable, __file__, "--trl", side, *map(str, batch), str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        settings = variables(Path(folder), num_threads=NUM_THREADS)
        done = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_trl(side: str, per_forward: int, accumulated: int, seed: int) -> dict[str, Any]:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    torch.set_num_threads(NUM_THREADS)
    datasets.disable_progress_bars()
    recipe = recipe_of(seed, "store")
    folder = str(recipe.model.model_name_or_path)
    seen: list[dict[str, Any]] = []  # what each forward got; looked at when all is over
    logged: list[tuple[float, int]] = []  # the time, and the forwards until then

    class Watched(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            seen.append(dict(inputs))
            return super().training_step(model, inputs, *rest)

    class Clock(TrainerCallback):
        def on_log(self, *positional: Any, logs: dict[str, float], **named: Any) -> None:
            if "loss" in logs:
                logged.append((time.perf_counter(), len(seen)))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=recipe.model.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (ROOT / "configs" / "templates" / "thinking.jinja").read_text()
    rows = datasets.Dataset.from_list(conversations(recipe))
    with tempfile.TemporaryDirectory() as out:
        settings = trl_settings(
            recipe,
            output_dir=out,
            packing=side == "trl_packed",
            per_device_train_batch_size=per_forward,
            gradient_accumulation_steps=accumulated,
        )
        Watched(model, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()]).train()
    (begun, first), (ended, last) = logged[-2:]
    assert len(logged) == 3 and (first, last) == (len(seen) // 2, len(seen)), "not two epochs of as many steps"
    counts = [counts_of(**inputs) for inputs in seen[first:]]
    trained, tokens, sizes = zip(*counts, strict=True)
    ids = torch.cat(trained).numpy()
    return {"speed": len(ids) / (ended - begun), "tokens": sum(tokens), "in_forward": sum(sizes), **trained_of(ids)}


def counts_of(
    input_ids: Any, labels: Any, attention_mask: Any = None, position_ids: Any = None, **others: Any
) -> tuple[Any, int, int]:
    """The trained ids of a forward, its tokens, and its tokens with padding."""
    starts = labels[:, :1] if position_ids is None else labels[position_ids == 0]
    assert (starts == -100).all(), "the first token of a document has a label"
    num_tokens = input_ids.numel() if attention_mask is None else int(attention_mask.sum())
    return labels[labels != -100].cpu(), num_tokens, input_ids.numel()


def trl_settings(recipe: Recipe, **own: Any) -> SFTConfig:
    """Our recipe's settings in TRL's words."""
    import torch
    from trl import SFTConfig

    from sft_core.train.accelerator import liger

    training = recipe.last_phase.training
    return SFTConfig(
        assistant_only_loss=True,
        max_length=CAPACITY,
        num_train_epochs=training.num_train_epochs,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=math.ceil(training.warmup_ratio * 2 * STEPS_AN_EPOCH),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        activation_checkpointing=training.gradient_checkpointing,
        use_liger_kernel=liger(training.use_liger_kernel),
        seed=training.seed,
        logging_steps=STEPS_AN_EPOCH,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        **own,
    )


def conversations(recipe: Recipe) -> list[dict[str, Any]]:
    """The rows that the recipe trains on, as its files hold them, with the template's kwargs that it sets."""
    rows = []
    for dataset in recipe.last_phase.dataset_mixture.datasets:
        with Path(dataset.paths[0]).open(encoding="utf-8") as file:
            rows += [json.loads(line) for line in itertools.islice(file, recipe.limit)]
    return [
        {
            "messages": row["messages"],
            "chat_template_kwargs": {**recipe.chat_template.kwargs, **row["chat_template_kwargs"]},
        }
        for row in rows
    ]


# The pipeline around it


def warm_run(rounds: int) -> tuple[float, float]:
    """Seconds of the quickstart with every output in the store, and of an empty flow of its shape."""
    from sft_core.recipe.parse import load_recipe
    from steps.task_shares import shares_of

    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml")
    flow = [sys.executable, str(ROOT / "flows" / "sft_flow.py"), "run"]
    timed(flow, ROOT)  # the first fills the store
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty_flow.py"
        shape = {"{sources}": len(recipe.sources), "{shares}": len(shares_of(recipe))}
        empty.write_text(functools.reduce(lambda text, name: text.replace(name, str(shape[name])), shape, EMPTY_FLOW))
        # In turn, so that a machine whose speed drifts is fair to both.
        pairs = [(timed(flow, ROOT), timed([sys.executable, str(empty), "run"], Path(folder))) for _ in range(rounds)]
    warm, nothing = (statistics.median(side) for side in zip(*pairs, strict=True))
    return warm, nothing


def timed(command: list[str], folder: Path) -> float:
    environment = {"METAFLOW_USER": "benchmark", "METAFLOW_RUN_MAX_WORKERS": "2"}
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment | os.environ, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
