"""Metrics: how a generated answer is scored, 0 to 1, against what its row wants.

Invariant: what is wanted is read, and refused where it cannot be, before an answer is generated; an output that cannot
be read scores 0. Outputs come without their thinking.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sft_core.store.code_digest import user_code_digest

if TYPE_CHECKING:
    from sft_core.measuring import Evaluation

DEFAULT = "exact_match"
_LIBRARIES = {"numeric": "math-verify", "json_schema": "jsonschema", "reasoning_gym": "reasoning-gym"}


@dataclasses.dataclass(frozen=True)
class Question:
    """A row that a metric may ask the model."""

    row_id: str
    answer: str | None  # the row's own, if it has one
    target: str  # what the row trains as its last turn, without thinking
    conversation: dict[str, Any] | None = None  # canonical; for metrics that want it


@dataclasses.dataclass(frozen=True)
class Asked:
    shown: str | None  # what a reader is told was wanted
    wanted: Any  # what outputs are held against


class Metric(abc.ABC):
    """A metric by its name. As a context it frees what it holds."""

    wants_conversation = False
    num_timeouts = 0

    def __init__(self, name: str):
        self.name = name

    def ask(self, question: Question) -> Asked | None:
        """What the row wants; None where it is not asked. Raises ValueError for an answer that cannot be read."""
        return None if question.answer is None else Asked(question.answer, self.read(question.answer))

    def read(self, answer: str) -> Any:
        return answer

    @abc.abstractmethod
    def score(self, output: str, wanted: Any) -> float:
        """0 to 1."""

    def __enter__(self) -> Metric:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None


class ExactMatch(Metric):
    """The whole output, but for white space around it."""

    def score(self, output: str, wanted: str) -> float:
        return float(output.strip() == wanted.strip())


# "the answer is (B)", "Answer: **B**". A small letter only where no word can go on: "the answer is a dog" is none.
_LETTER = r"[\(\[]?\s*(?:([A-Z])(?![A-Za-z0-9'’])|([a-z])(?=[\)\]\}.,;*]|\s*\Z))"
_STATED = re.compile(
    r"\b(?i:answer|option|choice)\b(?i:(?:\s+(?:to|for)\b[^.\n]{0,80}?)?\s+(?:is|was|would\s+be))?"
    r"(?i:\s+(?:option|choice|letter)\b)?[\s:*_\"'$]*(?:\\(?:boxed|text|mathrm)\{\s*)*" + _LETTER
)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*[\(\[]?([A-Za-z])[\)\]]?\s*\}")
_ALONE = re.compile(r"[\s*_\"'`$]*[\(\[]?([A-Za-z])[\)\]]?[.:]?[\s*_\"'`$]*\Z")
_LEADING = re.compile(r"[\s*_]*(?:[\(\[]([A-Za-z])[\)\]]|([A-Z])[*_]*[.\):,](?![A-Za-z0-9]))")
_BRACKETED = re.compile(r"[\(\[]([A-Z])[\)\]]")


def choice_letter(text: str) -> str | None:
    """The letter that an answer chooses, as a capital; None where it names none, or several and decides for none.

    In this order: a letter alone; the last that is boxed or stated as the answer; one that leads the text, as
    "B. Paris"; one in brackets, where all of these are the same. A letter inside a word, or the article, is none.
    """
    if found := _ALONE.match(text):
        return found[1].upper()
    stated = [match for pattern in (_STATED, _BOXED) for match in pattern.finditer(text)]
    if found := max(stated, key=lambda match: match.end(), default=None) or _LEADING.match(text):
        return next(letter for letter in found.groups() if letter).upper()
    bracketed = {*_BRACKETED.findall(text)}
    return bracketed.pop() if len(bracketed) == 1 else None


class Choice(Metric):
    """The letter of a multiple choice, wherever the output states it."""

    def read(self, answer: str) -> str:
        letter = choice_letter(answer)
        if letter is None:
            raise ValueError(f"found {answer[:80]!r}; choice wants the letter of the right one, as 'B'")
        return letter

    def score(self, output: str, wanted: str) -> float:
        return float(choice_letter(output) == wanted)


_FENCED = re.compile(r"\s*```[A-Za-z0-9_-]*[ \t]*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


def parse_json(text: str) -> Any:
    """The JSON value of a whole text, which a code fence may surround. Raises ValueError."""
    fenced = _FENCED.match(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


class Json(Metric):
    """Valid JSON, where `schema` is given also by that. Every row is asked, for no answer is needed."""

    def __init__(self, name: str, schema: dict[str, Any] | None = None):
        super().__init__(name)
        self._validator = None if schema is None else _validator(schema)

    def ask(self, question: Question) -> Asked:
        return Asked(question.answer, None)

    def score(self, output: str, wanted: None) -> float:
        try:
            value = parse_json(output)
        except ValueError:
            return 0.0
        return float(self._validator is None or self._validator.is_valid(value))


def _validator(schema: dict[str, Any]) -> Any:
    """Raises ValueError for what is no schema, or refers to one that is not inside it: nothing is downloaded."""
    import jsonschema
    import referencing
    import referencing.jsonschema

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"is no JSON schema: {error.json_path}: {error.message}") from None
    dialect = referencing.jsonschema.specification_with(kind.META_SCHEMA["$schema"])
    resource = dialect.create_resource(schema)
    registry: Any = referencing.Registry().with_resource(resource.id() or "", resource).crawl()
    resolver = registry.resolver(resource.id() or "")
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except referencing.exceptions.Unresolvable:
            raise ValueError(f"refers to {reference!r}, which is not in it; write it below $defs") from None
    return kind(schema, registry=registry)


def _references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [found for element in schema for found in _references(element)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    return own + [found for element in schema.values() for found in _references(element)]


class ReasoningGym(Metric):
    """The scorer of the reasoning-gym task that a row's item comes from."""

    # These compare tuples, and JSON has none: their own answers do not score 1.
    _WITHOUT_JSON = ("arc_agi", "rearc")

    def read(self, answer: str) -> dict[str, Any]:
        from reasoning_gym.factory import DATASETS

        try:
            item = json.loads(answer)
            name = item["metadata"]["source_dataset"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"found {answer[:80]!r}; reasoning_gym wants the whole item as the row's answer: "
                '{"question": ..., "answer": ..., "metadata": {"source_dataset": ...}}'
            ) from None
        if name not in DATASETS or name in self._WITHOUT_JSON:
            why = "its items do not survive JSON" if name in DATASETS else "reasoning-gym has no such task"
            raise ValueError(f"metadata.source_dataset: found {name!r}; {why}")
        return item

    def ask(self, question: Question) -> Asked | None:
        asked = super().ask(question)
        return asked and Asked(str(asked.wanted.get("answer")), asked.wanted)

    def score(self, output: str, wanted: dict[str, Any]) -> float:
        import reasoning_gym

        score = reasoning_gym.get_score_answer_fn(wanted["metadata"]["source_dataset"])
        return float(score(output, wanted))


def metric_identity(evaluation: Evaluation, task: str) -> dict[str, Any]:
    """What a task's scores hang on besides the answers: the metric, and its schema, code or library.

    Raises ValueError for a schema file or a module that cannot be read.
    """
    name = evaluation.metric_by_task.get(task, DEFAULT)
    identity: dict[str, Any] = {"name": name}
    try:
        if name == "json_schema":
            identity["schema"] = _schema(evaluation.json_schema_by_task[task])
        if ":" in name:
            identity["code"] = user_code_digest(name.partition(":")[0])
    except ValueError as error:
        key = "json_schema" if name == "json_schema" else "metric"
        raise ValueError(f"evaluation.{key}_by_task.{task}: {error}") from None
    if name in _LIBRARIES:
        if importlib.util.find_spec(_LIBRARIES[name].replace("-", "_")) is None:
            raise ValueError(
                f"evaluation.metric_by_task.{task}: found {name!r}, and {_LIBRARIES[name]} is not installed; "
                "pip install 'sft-flow[eval]'"
            )
        identity["library"] = importlib.metadata.version(_LIBRARIES[name])
    return identity


def _schema(given: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"found {given!r}; no such file (looked in {Path.cwd()})")
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"{path}: a schema is a JSON object; found {type(schema).__name__}")
    return schema


def load_metric(identity: dict[str, Any]) -> Metric:
    """The metric of an identity. Raises ValueError for a schema that is none and a function that cannot be called."""
    from sft_core.evaluate.functions import Function
    from sft_core.evaluate.math_answers import Numeric
    from sft_core.evaluate.tool_calls import ToolCall

    name = identity["name"]
    if ":" in name:
        return Function(name)
    if name == "json_schema":
        return Json(name, identity["schema"])
    kinds = {
        "exact_match": ExactMatch,
        "numeric": Numeric,
        "choice": Choice,
        "json": Json,
        "tool_call": ToolCall,
        "reasoning_gym": ReasoningGym,
    }
    return kinds[name](name)


def check_metrics(evaluation: Evaluation, tasks: list[str]) -> None:
    """Raises ValueError for a metric that would fail when the answers are there."""
    for task in tasks:
        identity = metric_identity(evaluation, task)
        try:
            load_metric(identity)
        except ValueError as error:
            key = "json_schema" if identity["name"] == "json_schema" else "metric"
            raise ValueError(f"evaluation.{key}_by_task.{task}: {error}") from error
