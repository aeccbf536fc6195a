"""The sections of a recipe that measure: while it trains, and for the scores."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sft_core.sections import PositiveInt, Section
from sft_core.wording import nearest, short

LM_EVAL = (
    "lm_eval:"  # before the names of the harness's tasks, where they stand beside ours; no source's name has a ':'
)
METRICS = ("exact_match", "numeric", "choice", "json", "json_schema", "tool_call", "reasoning_gym")


class DuringTraining(Section):
    """The loss of each source's selection split, looked at while training goes on. It is never trained on."""

    every_epochs: Annotated[float, Field(gt=0)] = 0.25
    max_rows: PositiveInt = Field(100, description="unique selection prompts of each source, at most")
    keep_best: bool = Field(
        False, description="end with the weights whose loss is lowest, as a mean over sources, and not with the last"
    )


class Sampling(Section):
    """Answers that are drawn, and not the likeliest token each time. The draws are the seed's, the row's and the
    sample's, whatever else shares their batch."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    num_samples: PositiveInt = Field(1, description="answers to each prompt; a row's score is their mean")


class LmEval(Section):
    """Tasks of EleutherAI's lm-evaluation-harness: its prompts and metrics, on base and tuned model."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="names as `lm-eval ls tasks` has them")
    include_path: str | None = Field(None, description="a folder of task YAMLs, which win over the harness's own")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="default: the task's own")
    limit: PositiveInt | None = Field(None, description="only the first documents of each task")
    apply_chat_template: bool = Field(True, description="ask in a user turn; false: in plain text, for base models")
    chat_template_kwargs: dict[str, Any] = Field({}, description="win over chat_template.kwargs")
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = Field({}, description="win over a task's generation_kwargs, as max_gen_toks: 512")

    @model_validator(mode="after")
    def _consistent(self) -> LmEval:
        if len({*self.tasks}) < len(self.tasks):
            raise ValueError(f"tasks: found {', '.join(self.tasks)}; name each task once")
        if self.chat_template_kwargs and not self.apply_chat_template:
            raise ValueError("chat_template_kwargs: apply_chat_template is false; remove one of the two")
        return self


class Evaluation(Section):
    """What is scored: base and tuned model on the report split of each task."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="source names; default: every source"
    )
    max_rows: PositiveInt = Field(250, description="unique report prompts scored for each task, at most")
    min_report_rows: Annotated[int, Field(ge=0)] = Field(
        50, description="a task with fewer unique report prompts is an error"
    )
    max_new_tokens: PositiveInt = 256
    max_new_tokens_by_task: dict[str, PositiveInt] = Field({}, description="where a task needs more or fewer")
    metric_by_task: dict[str, str] = Field(
        {}, description=f"{', '.join(METRICS)}, or a function of yours as package.module:function; default: exact_match"
    )
    json_schema_by_task: dict[str, str | dict[str, Any]] = Field(
        {}, description="of each task with the metric json_schema: the schema, or the path of its file"
    )
    sampling: Sampling | None = Field(None, description="default: greedy answers")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="what answers the report rows; vllm is set up in runtime.vllm"
    )
    during_training: DuringTraining | None = None
    lm_eval: LmEval | None = Field(None, description="tasks of the lm-evaluation-harness, beside the report splits")

    @model_validator(mode="after")
    def _engine_can_draw(self) -> Evaluation:
        if self.engine == "vllm" and self.sampling is not None and self.sampling.temperature > 2:
            raise ValueError(f"sampling.temperature: found {self.sampling.temperature:g}; vllm draws at 2 and less")
        return self

    @model_validator(mode="after")
    def _metrics_are_known(self) -> Evaluation:
        for task, metric in self.metric_by_task.items():
            if metric not in METRICS and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", metric):
                raise ValueError(
                    f"metric_by_task.{task}: found {short(metric)}; it is no metric, and no function as "
                    f"package.module:function{nearest(metric, list(METRICS))}"
                )
        wanting = {task for task, metric in self.metric_by_task.items() if metric == "json_schema"}
        if missing := sorted(wanting - self.json_schema_by_task.keys()):
            raise ValueError(
                f"metric_by_task.{missing[0]}: found 'json_schema', and no schema; give "
                f"json_schema_by_task.{missing[0]}"
            )
        if unused := sorted(self.json_schema_by_task.keys() - wanting):
            raise ValueError(
                f"json_schema_by_task.{unused[0]}: no answer is held against it; set metric_by_task.{unused[0]} to "
                "json_schema, or remove it"
            )
        return self
