"""The folder that is handed on: the checkpoint's files and the model card.

Files are hard links to the training output's where the file system has them, so that it costs no room; nothing writes
to either afterwards, and removing one of the two outputs leaves the other whole.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.evaluate.rows import of_samples, read_rows
from sft_core.evaluate.summary import GAIN_HEADER
from sft_core.links import link_files
from sft_core.measuring import LM_EVAL
from sft_core.report.model_card import Base, Card, CutOff, Score, Source, model_card

if TYPE_CHECKING:
    from sft_core.store.stage import Build

log = logging.getLogger(__name__)
README = "README.md"


def build_release(
    build: Build,
    *,
    recipe: dict[str, Any],
    base: dict[str, Any],
    sources: list[dict[str, Any]],
    tasks: list[str],
    not_scored: list[str],
) -> dict[str, Any]:
    """Writes model/: what was trained, and README.md, its card.

    recipe: plain data without where it runs. base and sources: the fields of the card's Base and Source that a recipe
    and its pins know. not_scored: the tasks whose evaluation failed.
    """
    model = build.out / "model"
    num_linked, num_files = link_files(build.inputs["trained"] / "model", model, without=README)
    card = Card(
        name=recipe["name"],
        base=Base(**base),
        sources=_sources(sources, build),
        scores=_scores(tasks, build),
        not_scored=not_scored,
        harness_version=_harness_version(tasks, build),
        cut_offs=_cut_offs(tasks, build),
        gains=(GAIN_HEADER, [tuple(row.values()) for row in build.manifests["report"]["counts"]["thinking"]]),
        training=_training(recipe, build),
        recipe=recipe,
        template_kwargs=recipe["chat_template"]["kwargs"],
        has_thinking_switch="enable_thinking" in _template_of(model),
        lineage=_lineage(tasks, sources, build),
    )
    (model / README).write_text(model_card(card), encoding="utf-8")
    log.info("files=%d hard_links=%d", num_files, num_linked)
    return {"files": num_files + 1, "bytes": sum(path.stat().st_size for path in model.rglob("*") if path.is_file())}


def _harness_version(tasks: list[str], build: Build) -> str | None:
    """Of lm-eval, when the base was scored: the tuned model was by the same, or its task would have another key."""
    scored = (build.manifests[f"base.{task}"] for task in tasks if task.startswith(LM_EVAL))
    return next((manifest["identity"]["section"]["task"]["lm_eval"] for manifest in scored), None)


def _template_of(model: Path) -> str:
    """The chat template's text, wherever the tokenizer was saved with it."""
    files = (model / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    return "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())


def _sources(sources: list[dict[str, Any]], build: Build) -> list[Source]:
    mixture = build.manifests["mixture"]["counts"]
    found = []
    for source in sources:
        kept = mixture["sources"][source["name"]]
        conversations = build.manifests[f"conversations:{source['name']}"]["counts"]["conversations"]
        found.append(
            Source(
                **{**source, "files": tuple(source["files"])},
                conversations=conversations,
                rows=kept["kept"],
                tokens=kept["tokens"],
                trained_tokens=kept["trained_tokens"],
                share=kept["trained_tokens"] / max(1, mixture["trained_tokens"]),
            )
        )
    return found


def _scores(tasks: list[str], build: Build) -> list[Score]:
    reported = {(row["task"], row["metric"]): row for row in build.manifests["report"]["counts"]["scores"]}
    found = []
    for task in tasks:
        base, tuned = (
            {one["metric"]: one for one in build.manifests[f"{model}.{task}"]["counts"]["scores"]}
            for model in ("base", "tuned")
        )
        for metric, score in tuned.items():
            before, after = (
                (round(one["value"], 6), None if one["stderr"] is None else round(one["stderr"], 6))
                for one in (base[metric], score)
            )
            row = reported[task, metric]
            difference = None if row["difference"] is None else (row["difference"], row["low"], row["high"])
            found.append(Score(task, metric, score["n"], *before, *after, difference))
    return found


def _cut_offs(tasks: list[str], build: Build) -> list[CutOff]:
    """Of the tasks whose rows have an answer to generate."""
    found = []
    for task in tasks:
        if task.startswith(LM_EVAL):
            continue  # lm-eval does not say which answers it cut
        base, tuned = (of_samples(read_rows(build.inputs[f"{model}.{task}"]), "cut_off") for model in ("base", "tuned"))
        if tuned:
            found.append(CutOff(task, len(tuned), sum(base), sum(tuned)))
    return found


def _training(recipe: dict[str, Any], build: Build) -> dict[str, Any]:
    training, packs = recipe["training"], build.manifests["packs"]["counts"]
    trained, search = build.manifests["training"]["counts"], recipe["search"]
    lora, dropped = training["lora"], sum(packs["dropped"].values())
    searched = {"search": f"{search['strategy']}; what follows is its roll-out {trained['round']}"} if search else {}
    return {
        **searched,
        "optimizer steps": f"{trained['steps']:,} of {training['global_batch_size']} packs",
        "packs": f"{packs['packs']:,} of at most {packs['max_length']:,} tokens, {packs['fill']:.2%} full",
        "tokens an epoch": f"{packs['tokens']:,} in {packs['documents']:,} rows; rows dropped as too long: {dropped:,}",
        "loss": f"{trained['first_loss']:.4f} first, {trained['last_loss']:.4f} last, a trained token",
        "trained tokens": {"assistant": "every assistant turn", "completion": "the last turn", "all": "all"}[
            training["loss_scope"]
        ],
        "learning rate": f"{training['learning_rate']:g}, {training['lr_scheduler_type']}",
        "weights": f"LoRA of rank {lora['r']}, merged" if lora else "all",
        "precision": "bf16 autocast" if training["bf16"] else recipe["model"]["dtype"],
    }


def _lineage(tasks: list[str], sources: list[dict[str, Any]], build: Build) -> list[tuple[str, str]]:
    def address(name: str) -> str:
        return "/".join(build.manifests[name]["ref"])

    found = [("report", address("report"))]
    found += [
        (f"{model} scores of {task}", address(f"{model}.{task}")) for task in tasks for model in ("tuned", "base")
    ]
    found += [("checkpoint", address("trained")), ("packs", address("packs")), ("mixture", address("mixture"))]
    for source in sources:
        name = source["name"]
        found += [(f"{kind} of {name}", address(f"{kind}:{name}")) for kind in ("tokens", "conversations")]
        found.append((f"files of {name}", source["revision"]))
    return found
