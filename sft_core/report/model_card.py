"""The model card: README.md in the hub's format, metadata and Markdown. Sees plain numbers and strings only.

Names and licences come from data and from other people's cards, and none of them may act as Markdown or YAML: text is
escaped by `as_markup` and kept in one line, the hub's own library writes the metadata, and a fence is longer than any
in its text.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from sft_core.report.rows import PhaseChange
from sft_core.report.shown import as_markup
from sft_core.report.tables import markdown_table

Z_95 = 1.959964  # two-sided 95 % of the normal distribution
UNKNOWN = "unknown"
_FLOW = "sft-flow"
_SMOKE = (
    "**A smoke run**, on the first {limit} rows of each source: its scores are no result. A task without held-out "
    "prompts among them was scored on training rows."
)


_NOT_SCORED = (
    "**Not scored: {tasks}.** Their evaluation failed, so nothing here tells how the model does on them, and no mean "
    "over the table stands for all tasks."
)
_HARNESS = (
    "Tasks called `lm_eval:` are those of EleutherAI's lm-evaluation-harness ({version}), with its own prompts and "
    "metrics; whether their questions were trained on has not been looked at."
)


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that training started from."""

    name: str  # a hub id, a folder's name, or the kind of random weights
    hub_id: str | None
    revision: str | None  # the commit, or the digest of local files; None for random weights
    licence: str | None


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset, and its amounts in one epoch of its phase."""

    name: str
    phase: str
    hub_id: str | None
    config: str | None
    split: str | None
    files: tuple[str, ...]
    revision: str  # the commit, or the digest of local files
    licence: str | None
    conversations: int
    rows: int
    tokens: int
    trained_tokens: int
    share: float  # of the trained tokens of the phase's mixture


class Value(NamedTuple):
    value: float
    stderr: float | None


@dataclasses.dataclass(frozen=True)
class Score:
    """by_model: the start model first, the released one last. difference: last - first, and its 95 % interval."""

    task: str
    metric: str
    n: int
    by_model: dict[str, Value]
    difference: tuple[float, float | None, float | None] | None = None
    is_share: bool = dataclasses.field(kw_only=True)  # a share of right answers: a mean of values mostly 0 or 1

    @property
    def released(self) -> Value:
        return [*self.by_model.values()][-1]


@dataclasses.dataclass(frozen=True)
class CutOff:
    """by_model: how many of the `n` answers ended at the limit of new tokens."""

    task: str
    n: int
    by_model: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Card:
    name: str
    base: Base
    sources: list[Source]
    scores: list[Score]
    cut_offs: list[CutOff]
    gains: tuple[tuple[str, ...], list[tuple[object, ...]]]  # header and rows; no rows where nothing was compared
    training: dict[str, dict[str, str]]  # facts of each phase
    recipe: dict[str, Any]  # plain data
    template_kwargs: dict[str, Any]
    has_thinking_switch: bool
    lineage: list[tuple[str, str]]  # (output, its address in the store or its commit), from scores back to sources
    phase_changes: list[PhaseChange] = dataclasses.field(default_factory=list)
    not_scored: list[str] = dataclasses.field(default_factory=list)  # tasks whose evaluation failed
    harness_version: str | None = None  # of lm-eval, where its tasks are scored


def model_card(card: Card) -> str:
    """README.md's text. Raises ValueError when the hub's library does not read it back."""
    from huggingface_hub import ModelCard

    sections = [
        f"# {_text(card.name)}",
        _origin(card.base),
        *_scores(card),
        *_data(card.sources),
        "## Training",
        *_training(card.training),
        *_use(card),
        "## Recipe",
        "Without `runtime` and `hub`, which change nothing of the result; local paths are file names.",
        _fenced("yaml", _yaml(card.recipe)),
        "## Lineage",
        "Addresses of the store that made it, from the scores back to the sources.",
        _table(("output", "address"), card.lineage),
    ]
    return str(ModelCard(f"---\n{_metadata(card)}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _metadata(card: Card) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    by_name = {source.name: source for source in card.sources}
    results = []
    for score in card.scores:
        if not math.isfinite(score.released.value):
            continue  # the hub takes finite numbers only; the table shows this score
        low, high = interval(*score.released, score.n, is_share=score.is_share)
        of_source = by_name.get(score.task)
        results.append(
            EvalResult(
                task_type="text-generation",
                **(_dataset(of_source) if of_source else {"dataset_type": _line(score.task)}),
                dataset_name=_line(score.task),
                metric_type=score.metric,
                metric_value=score.released.value,
                metric_name=f"{_words(score.metric)} ({_line(score.task)}{', held-out prompts' if of_source else ''})",
                metric_args={"n": score.n, "low_95": low, "high_95": high},
            )
        )
    data = ModelCardData(
        base_model=card.base.hub_id,
        datasets=sorted({source.hub_id for source in card.sources if source.hub_id}) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sft", _FLOW],
        model_name=card.name,
        eval_results=results or None,
    )
    return data.to_yaml()


def _dataset(source: Source) -> dict[str, str | None]:
    return {
        "dataset_type": _line(source.hub_id or source.name),
        "dataset_config": source.config and _line(source.config),
        "dataset_split": source.split and _line(source.split),
        "dataset_revision": source.revision if source.hub_id else None,
    }


def interval(value: float, stderr: float | None, n: int, *, is_share: bool) -> tuple[float | None, float | None]:
    """The 95 % interval; (None, None) for a single row.

    A share gets Wilson's interval (1927), which has a width even where every answer is right and the values have no
    spread. Any other score gets the normal interval.
    """
    if stderr is None or not math.isfinite(value):
        return None, None
    if is_share:
        scale = 1 + Z_95**2 / n
        centre = (value + Z_95**2 / (2 * n)) / scale
        half = Z_95 * math.sqrt(value * (1 - value) / n + Z_95**2 / (4 * n**2)) / scale
        return round(max(0.0, centre - half), 6), round(min(1.0, centre + half), 6)
    return round(value - Z_95 * stderr, 6), round(value + Z_95 * stderr, 6)


# Sections


def _origin(base: Base) -> str:
    revision = f" at revision {_code(base.revision)}" if base.revision else ""
    lines = [f"Fine-tuned on conversations with {_FLOW}, from {_text(base.name)}{revision}."]
    if base.revision:
        lines.append(f"Licence of the base model: {_text(base.licence or UNKNOWN)}.")
    return " ".join([*lines, "This card states no licence of its own: it follows from those of the base and the data."])


def _training(by_phase: dict[str, dict[str, str]]) -> list[str]:
    if len(by_phase) == 1:
        return [_bullets(facts) for facts in by_phase.values()]
    return [text for phase, facts in by_phase.items() for text in (f"### Phase {_text(phase)}", _bullets(facts))]


def _models(models: list[str]) -> str:
    if len(models) <= 2:
        return "Base and tuned model"
    return f"The base model, and the checkpoints of the phases {', '.join(_text(model) for model in models[1:])},"


def _scores(card: Card) -> list[str]:
    models = [*card.scores[0].by_model] if card.scores else []
    rows = [
        (
            score.task,
            _words(score.metric),
            score.n,
            *(_with_interval(*value, score.n, is_share=score.is_share) for value in score.by_model.values()),
            _difference(score.difference),
        )
        for score in card.scores
    ]
    sections = [
        "## Scores",
        f"{_models(models)} on the same held-out prompts, with 95 % intervals, that of the difference over pairs of "
        f"rows; {_generated(card.recipe)}",
        *([_HARNESS.format(version=_text(card.harness_version))] if card.harness_version else []),
        *([_SMOKE.format(limit=card.recipe["limit"])] if card.recipe.get("limit") else []),
        *([_NOT_SCORED.format(tasks=_text(", ".join(card.not_scored)))] if card.not_scored else []),
        *([_table(("task", "metric", "n", *models, "difference"), rows)] if rows else []),
    ]
    if card.phase_changes:
        changes = [
            (row["task"], _words(row["metric"]), row["phase"], _difference((row["value"], row["low"], row["high"])))
            for row in card.phase_changes
        ]
        columns = ("task", "metric", "phase", "difference to the model before it")
        sections += ["What each phase changes, over pairs of rows:", _table(columns, changes)]
    if card.cut_offs:
        shares = [
            (cut_off.task, cut_off.n, *(f"{count / cut_off.n:.1%}" for count in cut_off.by_model.values()))
            for cut_off in card.cut_offs
        ]
        sections += [
            "Answers that were cut off at the limit of new tokens:",
            _table(("task", "answers", *models), shares),
        ]
    header, gains = card.gains
    if gains:
        sections += ["What thinking gains (mean score, paired 95 % interval):", _table(header, gains)]
    return sections


def _generated(recipe: dict[str, Any]) -> str:
    sampling = recipe.get("evaluation", {}).get("sampling")
    if sampling is None:
        return "answers are generated greedily."
    settings = ", ".join(f"{name} {value}" for name, value in sampling.items() if value is not None)
    return f"answers are sampled ({_text(settings)})."


def _data(sources: list[Source]) -> list[str]:
    has_phases = len({source.phase for source in sources}) > 1
    rows = [
        (
            source.name,
            *([source.phase] if has_phases else []),
            ", ".join(filter(None, [source.hub_id, source.config, source.split])) or ", ".join(source.files),
            source.revision,
            source.licence or UNKNOWN,
            source.conversations,
            source.rows,
            source.tokens,
            source.trained_tokens,
            f"{source.share:.1%}",
        )
        for source in sources
    ]
    header = (
        *("source", *(["phase"] if has_phases else []), "from", "revision", "licence"),
        *("conversations", "rows", "tokens", "trained tokens", "share"),
    )
    return [
        "## Data",
        "What an epoch holds of each source, before rows that are too long are left out; the share is of trained "
        "tokens. A revision is a commit of the hub, or the SHA-256 of local files.",
        _table(header, rows),
    ]


def _use(card: Card) -> list[str]:
    kwargs = card.template_kwargs
    sentences = ["The chat template is in the checkpoint."]
    if card.has_thinking_switch:
        kwargs = {"enable_thinking": True, **kwargs}
        sentences.append("`enable_thinking` chooses: `True` for a thinking block before the answer, `False` for none.")
    arguments = "".join(f"    {key}={value!r},\n" for key, value in kwargs.items() if key.isidentifier())
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'name = "."  # this folder, or the id of this repository\n'
        "tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)\n"
        "prompt = tokenizer.apply_chat_template(\n"
        '    [{"role": "user", "content": "Hello"}],\n'
        "    add_generation_prompt=True,\n"
        f"{arguments}"
        '    return_tensors="pt",\n'
        "    return_dict=True,\n"
        ")\n"
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=256)[0]))"
    )
    served = [f"Served by vLLM, requests carry {_code(_json({'chat_template_kwargs': kwargs}))}."] if kwargs else []
    return ["## Use", " ".join(sentences), _fenced("python", code), *served]


# Markdown and YAML


def _with_interval(value: float, stderr: float | None, n: int, *, is_share: bool) -> str:
    low, high = interval(value, stderr, n, is_share=is_share)
    return f"{value:.4f}" if low is None else f"{value:.4f} ({low:.4f} to {high:.4f})"


def _difference(difference: tuple[float, float | None, float | None] | None) -> str | None:
    if difference is None:
        return None
    value, low, high = difference
    return f"{value:+.4f}" if low is None else f"{value:+.4f} ({low:+.4f} to {high:+.4f})"


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    escaped = [tuple(_text(value) if isinstance(value, str) else value for value in row) for row in rows]
    return markdown_table(tuple(map(_text, header)), escaped)


def _bullets(facts: dict[str, str]) -> str:
    return "\n".join(f"- {_text(name)}: {_text(str(value))}" for name, value in facts.items())


def _text(value: str) -> str:
    """Text that Markdown shows unchanged, in one line."""
    return as_markup(_line(value))


def _line(value: str) -> str:
    """Text without characters that do not show: YAML reads some of them back as others."""
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def _code(text: str) -> str:
    text = _line(text)  # an empty line would end the paragraph, and the code with it
    ticks, padding = "`" * (1 + _longest_run(text)), " " if "`" in text else ""
    return f"{ticks}{padding}{text}{padding}{ticks}"


def _fenced(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + _longest_run(text))
    return "\n".join([f"{fence}{language}", text.rstrip("\n"), fence])


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _json(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(data)


def _yaml(data: dict[str, Any]) -> str:
    """YAML 1.2, as a recipe is read."""
    from ruamel.yaml import YAML

    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style, writer.width, writer.sort_base_mapping_type_on_output = False, 120, False
    # Escape characters that do not show: YAML reads some of them back as others.
    writer.allow_unicode = json.dumps(data, ensure_ascii=False).isprintable()
    text = io.StringIO()
    writer.dump(data, text)
    return text.getvalue()
