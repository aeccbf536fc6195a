"""The released folder: the checkpoint's files and the model card.

Its files are hard links to those of the training output where the file system has hard links, so a release takes no
room. Nothing writes to either output afterwards, and removing one leaves the other whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.data.mixing.mixture_counts import MixtureCounts
from sft_core.data.packing.pack_counts import PackCounts
from sft_core.data.sources.conversation_counts import ConversationCounts
from sft_core.evaluate.counts import ReportCounts
from sft_core.evaluate.rows import of_samples, read_rows
from sft_core.evaluate.summary import GAIN_HEADER
from sft_core.links import link_files
from sft_core.recipe.evaluation import LM_EVAL
from sft_core.report import rows
from sft_core.report.model_card import Base, Card, CutOff, Score, Source, Value, model_card
from sft_core.rounds import BASE
from sft_core.train.counts import TrainedCounts

if TYPE_CHECKING:
    from sft_core.store.stage import Build

log = logging.getLogger(__name__)
README = "README.md"


def build_release(
    build: Build,
    *,
    recipe: dict[str, Any],
    base: dict[str, Any],
    models: list[str],
    phases: dict[str, str],
    sources: list[dict[str, Any]],
    tasks: list[str],
    not_scored: list[str],
    shares: list[str],
) -> dict[str, int]:
    """Writes model/: the released checkpoint, and README.md, its card.

    recipe: plain data without `runtime` and `hub`. base and sources: the fields of the card's Base and Source that a
    recipe and its pins know. models: the scored models, the start model first. phases: {name: ending of the names of
    the phase's inputs}, as in `packs of mid`. not_scored: the tasks whose evaluation failed. shares: the metrics whose
    score is a share of right answers.
    """
    model = build.out / "model"
    report = ReportCounts.from_json(build.manifests["report"]["counts"])
    num_linked, num_files = link_files(build.inputs["trained"] / "model", model, without=README)
    card = Card(
        name=recipe["name"],
        base=Base(**base),
        sources=_sources(sources, phases, build),
        scores=_scores(report, tasks, models, shares, build),
        not_scored=not_scored,
        harness_version=_harness_version(tasks, build),
        cut_offs=_cut_offs(tasks, models, build),
        phase_changes=report.phases,
        gains=(GAIN_HEADER, [tuple(row.values()) for row in report.thinking]),
        training={name: _training(recipe, name, label, build) for name, label in phases.items()},
        recipe=recipe,
        template_kwargs=recipe["chat_template"]["kwargs"],
        has_thinking_switch="enable_thinking" in _template_of(model),
        lineage=_lineage(tasks, models, phases, sources, build),
    )
    (model / README).write_text(model_card(card), encoding="utf-8")
    log.info("files=%d hard_links=%d", num_files, num_linked)
    return {"files": num_files + 1, "bytes": sum(path.stat().st_size for path in model.rglob("*") if path.is_file())}


def _harness_version(tasks: list[str], build: Build) -> str | None:
    """lm-eval's version, or None without its tasks. It is in the task's key, so all models are scored by the same."""
    scored = (build.manifests[f"{BASE}.{task}"] for task in tasks if task.startswith(LM_EVAL))
    return next((manifest["identity"]["section"]["task"]["lm_eval"] for manifest in scored), None)


def _template_of(model: Path) -> str:
    """The chat template's text, from either file in which a tokenizer keeps it."""
    files = (model / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    return "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())


def _sources(sources: list[dict[str, Any]], phases: dict[str, str], build: Build) -> list[Source]:
    card_sources = []
    for source in sources:
        mixture = MixtureCounts.from_json(build.manifests[f"mixture{phases[source['phase']]}"]["counts"])
        mixed = mixture.sources[source["name"]]
        downloaded = ConversationCounts.from_json(build.manifests[f"conversations:{source['name']}"]["counts"])
        card_sources.append(
            Source(
                **{**source, "files": tuple(source["files"])},
                conversations=downloaded.conversations,
                rows=mixed.kept,
                tokens=mixed.tokens,
                trained_tokens=mixed.trained_tokens,
                share=mixed.trained_tokens / max(1, mixture.trained_tokens),
            )
        )
    return card_sources


def _scores(report: ReportCounts, tasks: list[str], models: list[str], shares: list[str], build: Build) -> list[Score]:
    by_metric = {(row.task, row.metric): row for row in report.scores}
    scores = []
    for task in tasks:
        by_model = {
            model: {score["metric"]: score for score in build.manifests[f"{model}.{task}"]["counts"]["scores"]}
            for model in models
        }
        for metric, score in by_model[models[-1]].items():
            row = by_metric[task, metric]
            difference = None if row.difference is None else (row.difference, row.low, row.high)
            values = _values(by_model, metric)
            scores.append(Score(task, metric, score["n"], values, difference, is_share=metric in shares))
    return scores


def _values(scores: Mapping[str, Mapping[str, rows.Score]], metric: str) -> dict[str, Value]:
    """scores: {model: {metric: score}}."""
    values = {}
    for model, by_metric in scores.items():
        value, stderr = by_metric[metric]["value"], by_metric[metric]["stderr"]
        values[model] = Value(round(value, 6), None if stderr is None else round(stderr, 6))
    return values


def _cut_offs(tasks: list[str], models: list[str], build: Build) -> list[CutOff]:
    """One for each task whose rows have an answer to generate."""
    cut_offs = []
    for task in tasks:
        if task.startswith(LM_EVAL):
            continue  # lm-eval does not say which answers it cut
        by_model = {model: of_samples(read_rows(build.inputs[f"{model}.{task}"]), "cut_off") for model in models}
        if num_answers := len(by_model[models[-1]]):
            cut_offs.append(CutOff(task, num_answers, {model: sum(cut_off) for model, cut_off in by_model.items()}))
    return cut_offs


def _training(recipe: dict[str, Any], phase: str, label: str, build: Build) -> dict[str, str]:
    """The card's facts on the phase."""
    keys = recipe["phases"][phase] if "phases" in recipe else recipe
    training, search, lora = keys["training"], keys["search"], keys["training"]["lora"]
    packs = PackCounts.from_json(build.manifests[f"packs{label}"]["counts"])
    trained = TrainedCounts.from_json(build.manifests[f"training{label}"]["counts"])
    dropped = sum(packs.dropped.values())
    searched = {"search": f"{search['strategy']}; what follows is its roll-out {trained.round}"} if search else {}
    return {
        **searched,
        "optimizer steps": f"{trained.steps:,} of {training['global_batch_size']} packs",
        "packs": f"{packs.packs:,} of at most {packs.max_length:,} tokens, {packs.fill:.2%} full",
        "tokens an epoch": f"{packs.tokens:,} in {packs.documents:,} rows; rows dropped as too long: {dropped:,}",
        "loss": f"{trained.first_loss:.4f} first, {trained.last_loss:.4f} last, a trained token",
        "trained tokens": {"assistant": "every assistant turn", "completion": "the last turn", "all": "all"}[
            training["loss_scope"]
        ],
        "learning rate": f"{training['learning_rate']:g}, {training['lr_scheduler_type']}",
        "weights": f"LoRA of rank {lora['r']}, merged" if lora else "all",
        "precision": "bf16 autocast" if training["bf16"] else recipe["model"]["dtype"],
    }


def _lineage(
    tasks: list[str], models: list[str], phases: dict[str, str], sources: list[dict[str, Any]], build: Build
) -> list[tuple[str, str]]:
    def address(name: str) -> str:
        return "/".join(build.manifests[name]["ref"])

    lineage = [("report", address("report"))]
    lineage += [
        (f"{model} scores of {task}", address(f"{model}.{task}")) for task in tasks for model in reversed(models)
    ]
    lineage.append(("checkpoint", address("trained")))
    for label in phases.values():
        kinds = ("training", "packs", "mixture") if label else ("packs", "mixture")
        lineage += [(f"{kind}{label}", address(f"{kind}{label}")) for kind in kinds]
    for source in sources:
        name = source["name"]
        lineage += [(f"{kind} of {name}", address(f"{kind}:{name}")) for kind in ("tokens", "conversations")]
        lineage.append((f"files of {name}", source["revision"]))
    return lineage
