"""Search strategies on one mixture of unequal tasks, each with the training of plain SFT to spend.

    python benchmarks/search.py

Thirteen string tasks of 40 to 400 rows, without noise in their labels. All runs start from one small model that has
learnt the quickstart's tasks and none of these: some of them it learns in a few epochs, some need all that there are,
and some rules it does not find, so that it soon remembers their rows. A run is a strategy with a seed, which draws the
rows of the mixture and their order. All strategies that a recipe knows take part, msft with both of its presets.

Equal is what a strategy may train: the FLOPs of 12 epochs of the whole mixture, roll-outs that are thrown away
included. sft, continual and strategies of one roll-out train 12 epochs; sro and soft_sro 6 in the first roll-out and at
most as much after it; msft goes on in roll-outs of two epochs for as long as the next one fits. All are evaluated four
times an epoch, and what that took is told beside. All deliver the evaluation of the best pooled selection score.

Scores are of the report split, which no decision has seen: the mean over tasks, then over seeds, with a 95 % interval
(Student's t) over seeds, and the difference to plain SFT of the same seed with its own.

The control is a mixture that nobody over-fits, large tasks and few epochs: msft with the preset robust must exclude
nobody there. Whom the preset paper would have dropped on the same curves stands beside it.

Runs are outputs of a store of their own: killed and started again, the benchmark goes on. Writes results.json into it.
Prints tables, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

if TYPE_CHECKING:
    from sft_core.store.store import Store
    from steps.search import Searched

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA_SEED = 0
LETTERS, VOWELS, DIGITS = "abcdeghilmnorstu", "aeiou", "0123456789"
# None is the quickstart's, on which the start model is trained. What each answers to a string:
LETTER_TASKS: dict[str, Callable[[str], str]] = {
    "last": lambda text: text[-1],
    "swap ends": lambda text: text[-1] + text[1:-1] + text[0],
    "rotate": lambda text: text[1:] + text[0],
    "double": lambda text: "".join(2 * one for one in text),
    "next": lambda text: "".join(LETTERS[(LETTERS.index(one) + 1) % len(LETTERS)] for one in text),
    "highest": max,
    "hide vowels": lambda text: "".join("-" if one in VOWELS else one for one in text),
    "count consonants": lambda text: str(sum(one not in VOWELS for one in text)),
    "sort down": lambda text: "".join(sorted(text, reverse=True)),
    "repeats": lambda text: "yes" if len({*text}) < len(text) else "no",
}
# A model of this size remembers their rows and does not find the rule.
DIGIT_TASKS: dict[str, Callable[[str], str]] = {
    "digit sum": lambda digits: str(sum(map(int, digits)) % 10),
    "product": lambda digits: str(math.prod(map(int, digits)) % 10),
    "by three": lambda digits: "no" if int(digits) % 3 else "yes",
}


class Mixture(NamedTuple):
    """num_rows: training rows of each task. budget: epochs of the whole mixture."""

    num_rows: dict[str, int]
    budget: float
    rollout: float  # epochs of one of msft's
    max_rows: int = 60  # selection rows of a task, and half of its report rows


UNEQUAL = Mixture(
    {
        "last": 40,
        "by three": 60,
        "repeats": 60,
        "hide vowels": 60,
        "double": 60,
        "highest": 60,
        "product": 100,
        "rotate": 100,
        "swap ends": 100,
        "digit sum": 150,
        "next": 150,
        "count consonants": 300,
        "sort down": 400,
    },
    budget=12,
    rollout=2,
)
CONTROL = Mixture({"rotate": 1000, "swap ends": 1000, "next": 1000, "sort down": 1000}, budget=2, rollout=1)
SMALL = Mixture({"last": 20, "rotate": 60}, budget=2, rollout=1, max_rows=10)
SMALL_CONTROL = SMALL._replace(num_rows={"last": 60, "rotate": 60}, budget=1)
# Student's t for 95 % of a mean, by its degrees of freedom.
T_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Variant(NamedTuple):
    strategy: str
    preset: str | None = None

    def __str__(self) -> str:
        return f"{self.strategy} {self.preset}" if self.preset else self.strategy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [str(variant) for variant in variants()]
    parser.add_argument("--seeds", type=int, choices=range(1, len(T_95) + 1), default=3, help="how many", metavar="N")
    parser.add_argument(
        "--strategies", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "search", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="a smaller model on fewer rows: whether it runs")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one bar is for the runs, transformers' for each load
    chosen = [variant for variant in variants() if str(variant) in options.strategies]
    runs, controls = run_all(chosen, range(options.seeds), options.store, small=options.small)
    results = {"strategies": summaries(runs), "control": controls, "runs": runs}
    path = options.store / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    print(f"\nwritten: {path}\n")
    print(json.dumps({"strategies": results["strategies"], "control": controls}))


def variants() -> list[Variant]:
    """All that a recipe knows; msft with each of its presets."""
    from sft_core.recipe.search.registry import STRATEGIES
    from sft_core.recipe.search.strategies.msft import MsftSettings

    presets = get_args(MsftSettings.model_fields["preset"].annotation)
    return [
        Variant(strategy, preset) for strategy in STRATEGIES for preset in (presets if strategy == "msft" else (None,))
    ]


# Data


def write_data(folder: Path) -> None:
    """A file of conversations for each task, by the quickstart's generator from a seed of our own."""
    from configs.quickstart.make_quickstart import distinct_strings, row

    folder.mkdir(parents=True, exist_ok=True)
    for alphabet, tasks in ((LETTERS, LETTER_TASKS), (DIGITS, DIGIT_TASKS)):
        for name, solve in tasks.items():
            texts = distinct_strings(alphabet, random.Random(f"{DATA_SEED} {name}"))
            lines = [json.dumps(row(f"{name}: {text}", solve(text), None)) + "\n" for text in texts]
            (folder / f"{source(name)}.jsonl").write_text("".join(lines))


def source(task: str) -> str:
    return task.replace(" ", "_")


def start_recipe(root: Path, *, small: bool) -> dict[str, Any]:
    """Of the model that all runs start from: it has learnt the quickstart's tasks, from random weights."""
    width, num_layers = (32, 2) if small else (96, 2)
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": num_layers}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 291, "max_position_embeddings": 512}
    tokenizer = ROOT / "configs" / "quickstart" / "tokenizer"
    return {
        "name": "search-benchmark",
        "model": {
            "tokenizer_name_or_path": str(tokenizer),
            "config": {"model_type": "llama", "initializer_range": 0.05, "tie_word_embeddings": True, **shape},
        },
        "chat_template": {"template": "thinking", "kwargs": {"header": False}},
        "dataset_mixture": {
            "selection_share": 0.1,
            "report_share": 0.15,
            "datasets": [{"path": str(path)} for path in sorted((ROOT / "configs" / "quickstart").glob("*.jsonl"))],
        },
        "packing": {"max_length": 384, "over_long": "error"},
        "training": {
            "learning_rate": 1e-3,
            "num_train_epochs": 0.02 if small else 4,
            "global_batch_size": 1,
            "weight_decay": 0.01,
            "extra": {"adam_beta2": 0.98},
        },
        "runtime": {
            "store": str(root),
            "num_threads": 1,  # two threads wait for each other more than they help at this size
            "num_workers": 1,
            "eval_batch_size": 256,
            "save_steps": 500,
            "logging_steps": 100,
        },
    }


def recipe_of(variant: Variant, mixture: Mixture, seed: int, start: dict[str, Any], model: Path) -> dict[str, Any]:
    """Plain data of a run's recipe. start: that of the start model, which is in the folder `model`."""
    root = Path(start["runtime"]["store"])
    datasets = [
        {"name": source(task), "path": str((root / "data" / f"{source(task)}.jsonl").resolve()), "num_rows": num_rows}
        for task, num_rows in mixture.num_rows.items()
    ]
    rounds = {"msft": mixture.rollout, "sro": mixture.budget / 2, "soft_sro": mixture.budget / 2}
    search = {"strategy": variant.strategy, "epochs_per_rollout": rounds.get(variant.strategy, mixture.budget)}
    search |= {"evaluations_per_epoch": 4, "max_rows": mixture.max_rows}
    if variant.strategy == "msft":
        search |= {"preset": variant.preset, "max_rollouts": 1000}  # the budget ends it
    training = {name: value for name, value in start["training"].items() if name != "num_train_epochs"}
    return {
        **start,
        "model": {"model_name_or_path": str(model), "tokenizer_name_or_path": start["model"]["tokenizer_name_or_path"]},
        "dataset_mixture": {**start["dataset_mixture"], "seed": seed, "datasets": datasets},
        "training": {**training, "seed": seed, "learning_rate": 5e-4, "lr_scheduler_type": "constant"},
        "search": search,
        "evaluation": {
            "max_rows": 2 * mixture.max_rows,
            "min_report_rows": mixture.max_rows,
            "max_new_tokens": 12,
        },
    }


# Runs


def run_all(
    chosen: Sequence[Variant], seeds: Iterable[int], root: Path, *, small: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What each run measured, in the order of the strategies and seeds, and what became of each control."""
    from tqdm import tqdm

    from sft_core.store.store import Store

    write_data(root / "data")
    store, robust = Store(root), Variant("msft", "robust")
    unequal, control = (SMALL, SMALL_CONTROL) if small else (UNEQUAL, CONTROL)
    start = start_recipe(root, small=small)
    model = start_model(store, start)
    # Seed by seed, the control first: what is there when it is stopped can be compared.
    work = [one for seed in seeds for one in [(robust, control, seed), *((name, unequal, seed) for name in chosen)]]
    runs, controls = [], []
    for variant, mixture, seed in (bar := tqdm(work, disable=None, desc="runs")):
        bar.set_postfix_str(f"{variant}, seed {seed}")
        found = searched(store, recipe_of(variant, mixture, seed, start, model), mixture.budget)
        if mixture is control:
            controls.append({"seed": seed, **excluded(found)})
        else:
            runs.append({"strategy": str(variant), "seed": seed, **measured(store, found)})
    return runs, controls


def start_model(store: Store, recipe: dict[str, Any]) -> Path:
    """The folder of the weights that all runs start from."""
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe
    from steps.train import TRAINED

    with contextlib.redirect_stdout(io.StringIO()):
        return store.path(store.ensure(TRAINED, pin(parse_recipe(recipe)), round=0)) / "model"


def searched(store: Store, data: dict[str, Any], budget: float) -> Searched:
    """The search at its end, every roll-out in the store. Trains those that are not there yet."""
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe
    from sft_core.rounds import ONLY
    from steps.mix import MIXTURE
    from steps.search import progress
    from steps.train import TRAINED

    pinned = pin(parse_recipe(data))
    store.ensure(MIXTURE, pinned)
    while not (found := progress(store, pinned).searches[ONLY]).is_over:
        if found.measured and data["search"]["strategy"] == "msft" and not fits(store, found, budget):
            # A cap is no part of what a roll-out is: the search ends with those that are done.
            capped = {**data, "search": {**data["search"], "max_rollouts": len(found.measured)}}
            pinned = pin(parse_recipe(capped))
            continue
        with contextlib.redirect_stdout(io.StringIO()):  # the ranks' output, which is in the store too
            store.ensure(TRAINED, found.pinned, round=len(found.rounds.rollouts) - 1)
    return found


def fits(store: Store, found: Searched, budget: float) -> bool:
    """Whether the roll-out that comes next stays within the budget, should it run to its end."""
    from steps.mix import MIXTURE

    sources = store.manifest(store.ensure(MIXTURE, found.pinned))["counts"]["sources"]
    rollout = found.rounds.rollouts[-1]
    share = sum(sources[task]["tokens"] for task in rollout.active) / sum(one["tokens"] for one in sources.values())
    spent = sum(one.cost.training_flops for one in found.measured) / flops_of_an_epoch(found)
    return spent + rollout.epochs * share <= budget + 1e-6


def flops_of_an_epoch(found: Searched) -> float:
    """Of training on the whole mixture, which is what the first roll-out of mSFT trains."""
    first = found.measured[0]
    return first.cost.training_flops / float(first.curves.epochs[-1])


def excluded(found: Searched) -> dict[str, Any]:
    """Who left a search of the preset robust, and whom the preset paper drops on the curves of its first roll-out."""
    from sft_core.search.strategies.msft import Limits, Msft

    first, recipe = found.measured[0].curves, found.pinned.recipe
    assert recipe.last_phase.search is not None
    paper = Msft(
        recipe.last_phase.dataset_mixture.trained_sources, recipe.last_phase.search.epochs_per_rollout, Limits(1)
    )
    dropped = [task for one in found.measured for task in one.decision.dropped]
    return {"rollouts": len(found.measured), "robust": dropped, "paper": list(paper.observe(first).dropped)}


def measured(store: Store, found: Searched) -> dict[str, Any]:
    """Scores of the report split and what they cost, all of it from the store's outputs."""

    from steps.report import REPORT
    from steps.train import CHECKPOINT, TRAINED

    pinned = found.pinned
    scores = store.manifest(store.ensure(REPORT, pinned))["counts"]["scores"]
    exact, losses = (
        {row["task"]: row["tuned"] for row in scores if row["metric"] == metric} for metric in ("exact_match", "loss")
    )
    refs = [store.ensure(TRAINED, pinned, round=rollout.round) for rollout in found.rounds.rollouts]
    kept = [len(list((store.path(ref) / "evaluations").iterdir())) for ref in refs]
    at_once = [sum(kept[:round]) + one.cost.most_kept for round, one in enumerate(found.measured)]
    return {
        "exact_match": exact,
        "loss": losses,
        "rollouts": [
            {
                "active": list(rollout.active),
                "epochs": float(one.curves.epochs[-1]),
                "start": rollout.start,
                "dropped": list(one.decision.dropped),
                "goes_on_from": float(one.curves.epochs[one.decision.start.evaluation]),
            }
            for rollout, one in zip(found.rounds.rollouts, found.measured, strict=True)
        ],
        "delivered": found.rounds.best,
        "training_flops": sum(one.cost.training_flops for one in found.measured),
        "evaluation_flops": sum(one.cost.evaluation_flops for one in found.measured),
        "bytes": max(at_once) * store.num_bytes(store.ensure(CHECKPOINT, pinned)),
        "seconds": sum(store.manifest(ref)["seconds"] for ref in refs),
    }


# Tables


def summaries(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each strategy: means over its seeds, with half the width of their 95 % interval."""
    found = []
    plain = {run["seed"]: run for run in runs if run["strategy"] == "sft"}
    for name in dict.fromkeys(run["strategy"] for run in runs):
        mine = [run for run in runs if run["strategy"] == name]
        row: dict[str, Any] = {"strategy": name, "seeds": len(mine)}
        for metric in ("exact_match", "loss"):
            row[metric], row[f"{metric}_half_width"] = interval([over_tasks(run, metric) for run in mine])
            pairs = [(run, plain[run["seed"]]) for run in mine if run["seed"] in plain and name != "sft"]
            gains = [over_tasks(run, metric) - over_tasks(other, metric) for run, other in pairs]
            row[f"{metric}_gain"], row[f"{metric}_gain_half_width"] = interval(gains)
        row["spread"] = statistics.mean(statistics.pstdev(run["exact_match"].values()) for run in mine)
        row["worst"] = statistics.mean(min(run["exact_match"].values()) for run in mine)
        row["worst_loss"] = statistics.mean(max(run["loss"].values()) for run in mine)
        row["num_rollouts"] = statistics.mean(len(run["rollouts"]) for run in mine)
        for cost in ("training_flops", "evaluation_flops", "bytes", "seconds"):
            row[cost] = statistics.mean(run[cost] for run in mine)
        found.append(row)
    return found


def over_tasks(run: dict[str, Any], metric: str) -> float:
    """Each task counts the same."""
    return statistics.mean(run[metric].values())


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and half the width of its 95 % interval; None for what so few values do not tell."""
    if len(values) < 2:
        return (values[0] if values else None), None
    stderr = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), T_95[len(values) - 1] * stderr


def show(results: dict[str, Any]) -> None:
    from sft_core.report.tables import text_table

    rows = results["strategies"]

    def told(row: dict[str, Any], name: str, *, sign: bool = False) -> str:
        if row[name] is None:
            return "-"
        half = row[f"{name}_half_width"]
        return f"{row[name]:{'+' if sign else ''}.3f}" + ("" if half is None else f" ± {half:.3f}")

    scores = [
        (
            row["strategy"],
            row["seeds"],
            told(row, "exact_match"),
            told(row, "exact_match_gain", sign=True),
            told(row, "loss"),
            told(row, "loss_gain", sign=True),
            f"{row['spread']:.3f}",
            f"{row['worst']:.3f}",
            f"{row['worst_loss']:.3f}",
        )
        for row in rows
    ]
    header = ("strategy", "seeds", "exact match", "beside sft", "loss", "beside sft", "std of tasks")
    print(text_table((*header, "worst task", "highest loss"), scores) + "\n")
    costs = [
        (
            row["strategy"],
            f"{row['num_rollouts']:.1f}",
            f"{row['training_flops'] / 1e12:.3f}",
            f"{row['evaluation_flops'] / 1e12:.3f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]
    print(
        text_table(
            ("strategy", "roll-outs", "training TFLOPs", "evaluation TFLOPs", "MB of weights at most", "training s"),
            costs,
        )
        + "\n"
    )
    controls = [
        (one["seed"], one["rollouts"], ", ".join(one["robust"]) or "nobody", ", ".join(one["paper"]) or "nobody")
        for one in results["control"]
    ]
    print(text_table(("control: seed", "roll-outs", "robust excluded", "paper would drop after the first"), controls))


if __name__ == "__main__":
    main()
