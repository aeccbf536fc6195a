"""The sections of a recipe about evaluation: during training, and for the scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from sft_core.recipe.sections import PositiveInt, Section, Seed

LM_EVAL = "lm_eval:"  # before a task of the harness, where it is listed with sources; no source's name has a ':'
DEFAULT_METRIC = "exact_match"


class DuringTraining(Section):
    """The loss of each source's selection split is measured while training goes on. These rows are never trained."""

    every_epochs: Annotated[float, Field(gt=0)] = Field(0.25, description="epochs between two measurements")
    max_rows: PositiveInt = Field(100, description="unique selection prompts of each source, at most")
    keep_best: bool = Field(
        False, description="end with the weights whose loss is lowest, as a mean over sources, and not with the last"
    )


class Sampling(Section):
    """Answers are drawn, in place of the likeliest token each time. A draw depends on the seed, the row and the sample,
    not on the rows beside it."""

    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="what logits are divided by")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="draw from the likeliest tokens that together have this probability"
    )
    top_k: PositiveInt | None = Field(None, description="draw from so many of the likeliest tokens; default: from all")
    seed: Seed = Field(0, description="of the draws")
    num_samples: PositiveInt = Field(1, description="answers to each prompt; a row's score is their mean")


class LmEval(Section):
    """Tasks of EleutherAI's lm-evaluation-harness: its prompts and metrics, on base and tuned model."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="names as `lm-eval ls tasks` has them")
    include_path: str | None = Field(None, description="a folder of task YAMLs, which win over the harness's own")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="default: the task's own")
    limit: PositiveInt | None = Field(None, description="only the first documents of each task")
    apply_chat_template: bool = Field(True, description="ask in a user turn; false: in plain text, for base models")
    chat_template_kwargs: dict[str, JsonValue] = Field({}, description="win over chat_template.kwargs")
    system_instruction: str | None = Field(None, description="a system message before each prompt")
    gen_kwargs: dict[str, JsonValue] = Field(
        {}, description="win over a task's generation_kwargs, as max_gen_toks: 512"
    )

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
    max_new_tokens: PositiveInt = Field(256, description="tokens of an answer, at most")
    max_new_tokens_by_task: dict[str, PositiveInt] = Field({}, description="where a task needs more or fewer")
    metric_by_task: dict[str, str] = Field(
        {},
        description="a metric of sft_core/evaluate/metrics, or a function of yours as package.module:function; "
        f"default: {DEFAULT_METRIC}",
    )
    json_schema_by_task: dict[str, str | dict[str, JsonValue]] = Field(
        {}, description="of each task whose metric asks for a schema: the schema, or the path of its file"
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

    def metric_of(self, task: str) -> str:
        return self.metric_by_task.get(task, DEFAULT_METRIC)
