"""The sections of a recipe as frozen typed objects.

A field has the name that the alignment-handbook or TRL gives it, where they have such a field.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from sft_core.recipe.rank_strategies import DEFAULT, STRATEGIES, StrategyName
from sft_core.recipe.wording import short

Share = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as NumPy takes it
LossScope = Literal["assistant", "completion", "all"]
SECRETS = ("hub_token", "push_to_hub_token", "token", "use_auth_token")
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Model(Section):
    """The model to start from: a hub id, a folder, or `config` for random weights."""

    model_name_or_path: str | None = Field(None, description="a hub id or a folder; or give config")
    model_revision: str = Field("main", description="the branch, tag or commit of a hub id")
    config: dict[str, JsonValue] | None = Field(
        None, description="a transformers config: weights from the training seed"
    )
    tokenizer_name_or_path: str | None = Field(None, description="default: the model's own")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="the weights' dtype; bf16 autocast is training.bf16"
    )
    attn_implementation: Literal["auto", "varlen", "sdpa", "eager", "flex_attention", "flash_attention_2"] = Field(
        "auto",
        description="auto: varlen (PyTorch's flash attention over packed documents) on a GPU in half precision where "
        "the model's class allows it, else sdpa, else eager",
    )
    trust_remote_code: bool = Field(False, description="run Python code that the model brings")
    add_special_tokens: tuple[str, ...] = Field((), description="tokens to add; the embedding grows with them")
    eos_token: str | None = Field(None, description="the token that ends a turn; default: the tokenizer's")
    stop_tokens: tuple[str, ...] = Field((), description="further tokens at which serving stops, as <|call|>")

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.model_name_or_path is None) == (self.config is None):
            raise ValueError("give either model_name_or_path or config (and not both)")
        if self.config is not None and self.tokenizer_name_or_path is None:
            raise ValueError("a model from config needs tokenizer_name_or_path")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config.model_type is missing; write for example model_type: llama")
        return self

    @property
    def tokenizer(self) -> str:
        return self.tokenizer_name_or_path or self.model_name_or_path or ""


class ChatTemplate(Section):
    """How a conversation becomes text."""

    template: str | None = Field(None, description="thinking, a path to a .jinja file, or null: the tokenizer's own")
    kwargs: dict[str, JsonValue] = Field(
        {}, description="template variables; a row's chat_template_kwargs win over them"
    )
    date: datetime.date = Field(datetime.date(2026, 1, 1), description="what the template sees as today")
    thinking: Literal["keep", "drop", "only_last", "inline"] = Field(
        "keep",
        description="only_last: trained in its turn, gone from the history of turns after the next user turn; "
        "inline: written into the answer between <think> tags, for templates that know no reasoning_content",
    )
    empty_thinking: Literal["as_served", "trained", "masked"] = Field(
        "as_served", description="an empty think block: trained where the model writes it, or always, or never"
    )
    served_prefix: Literal["tokens", "text"] = Field(
        "tokens", description="turns share a row where a served prompt has the same tokens, or only the same text"
    )


class Packing(Section):
    """How rows become packs of at most `max_length` tokens."""

    packing_strategy: Literal["ffd", "none"] = Field(
        "ffd", description="ffd: first-fit-decreasing over the whole mixture; none: each row is a pack"
    )
    max_length: PositiveInt = Field(2048, description="tokens of a pack, at most")
    over_long: Literal["drop", "truncate", "split", "error"] = Field(
        "drop", description="rows over max_length: gone, cut after a whole turn, cut into several at turns, or an error"
    )


class Lora(Section):
    r: PositiveInt = Field(16, description="rank of the adapter's matrices")
    lora_alpha: PositiveInt = Field(32, description="the adapter's output is multiplied by lora_alpha / r")
    lora_dropout: Share = Field(0.0, description="share of the adapter's inputs that a training step drops")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="modules that get an adapter: their names, a regular expression, or all-linear"
    )
    use_dora: bool = Field(False, description="DoRA: magnitude and direction apart (arXiv 2402.09353)")
    use_rslora: bool = Field(False, description="rsLoRA: scaled by alpha / sqrt(r) (arXiv 2312.03732)")
    load_in_4bit: bool = Field(False, description="QLoRA: the base in NF4 while it trains (arXiv 2305.14314); a GPU")


class Training(Section):
    """Hyper-parameters. Everything here is part of the checkpoint's identity."""

    loss_scope: LossScope = Field(
        "assistant", description="train on assistant turns, on the last one, or on all tokens"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-5, description="the highest one, after the warm-up")
    lr_scheduler_type: Scheduler = Field(
        "cosine", description="how the learning rate changes after the warm-up, by transformers' names"
    )
    lr_scheduler_kwargs: dict[str, JsonValue] = Field({}, description="further settings of that scheduler")
    warmup_ratio: Share = Field(0.03, description="share of the optimizer steps in which the learning rate rises")
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="passes over the packs")
    max_steps: PositiveInt | None = Field(None, description="optimizer steps, in place of num_train_epochs")
    global_batch_size: PositiveInt = Field(8, description="packs an optimizer step, over all ranks")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of AdamW")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="larger gradients are scaled down; 0: never")
    bf16: bool = Field(False, description="compute in bfloat16 by autocast, over weights in model.dtype")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | None = Field(
        None, description="of the load-balancing loss of a mixture of experts; default: the model's own; 0: none"
    )
    use_liger_kernel: bool | Literal["auto"] = Field("auto", description="auto: on a GPU")
    lora: Lora | None = Field(None, description="train an adapter and merge it; default: full fine-tuning")
    seed: Seed = Field(42, description="of the order of packs, of dropout, and of random weights")
    extra: dict[str, JsonValue] = Field({}, description="any other field of trl.SFTConfig")

    @model_validator(mode="after")
    def _no_secret(self) -> Training:
        for key in sorted({*self.extra}.intersection(SECRETS)):
            raise ValueError(f"extra.{key}: a recipe is stored with what it makes; set HF_TOKEN in the environment")
        return self


class Resources(Section):
    """What a task asks of a cluster, as Metaflow's @resources has it; on one's own machine it changes nothing."""

    cpu: PositiveInt = Field(8, description="cores")
    memory: PositiveInt = Field(32_000, description="MB")
    gpu: PositiveInt | None = Field(None, description="GPUs")
    shared_memory: PositiveInt | None = Field(None, description="MB, which NCCL wants for several GPUs")


class ClusterResources(Section):
    data: Resources = Field(Resources(), description="of a task that downloads, renders, tokenizes, mixes or packs")
    train: Resources = Field(Resources(), description="of a training task: one a node")
    evaluate: Resources = Field(Resources(), description="of the task that scores one task of the recipe")


class VllmSettings(Section):
    """vLLM, where evaluation.engine asks for it."""

    python: str | None = Field(
        None, description="the interpreter of the environment that holds vllm; default: the one that runs"
    )
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs that share the model")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="share of each GPU's memory that vLLM may take"
    )


class Runtime(Section):
    """Where and how it runs. Never part of an identity: a change rebuilds nothing."""

    store: str = Field("store", description="a folder, or a URL as s3://bucket/prefix")
    num_nodes: PositiveInt = Field(1, description="machines that train together, each a Metaflow task of its own")
    num_processes: PositiveInt = Field(1, description="training ranks of a machine: its GPUs")
    distributed: StrategyName = Field(DEFAULT, description="how ranks share the model: configs/accelerate/*.yaml")
    num_threads: PositiveInt | None = Field(None, description="CPU threads a rank; default: cores / ranks")
    num_workers: PositiveInt | None = Field(None, description="processes that render and tokenize; default: cores")
    tokens_per_forward: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="as many whole packs of a rank's step as hold no more tokens are one forward, where attention "
        "knows documents (varlen, flash_attention_2); auto: what keeps a GPU busy and fits into its memory, one pack "
        "without a GPU",
    )
    eval_batch_size: PositiveInt | None = Field(
        None, description="prompts that are answered together, at most; default: what the device has room for"
    )
    vllm: VllmSettings = VllmSettings()
    save_steps: PositiveInt = Field(50, description="optimizer steps between checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="the newest ones that are kept while training")
    logging_steps: PositiveInt = Field(5, description="optimizer steps between lines of the log")
    report_to: tuple[str, ...] = Field((), description="trackers of transformers.Trainer, for example wandb")
    resources: ClusterResources = Field(ClusterResources(), description="what tasks ask of a cluster")

    @property
    def num_ranks(self) -> int:
        """Training ranks on all machines."""
        return self.num_nodes * self.num_processes

    @property
    def num_data_ranks(self) -> int:
        """Ranks that get packs of their own: the global batch is divided among them."""
        return STRATEGIES[self.distributed].num_data_ranks(self.num_ranks)

    @model_validator(mode="after")
    def _whole_groups_of_ranks(self) -> Runtime:
        ranks_a_pack = STRATEGIES[self.distributed].ranks_a_pack
        if self.num_ranks % ranks_a_pack:
            raise ValueError(
                f"num_nodes * num_processes is {self.num_ranks}; {self.distributed} computes each pack on "
                f"{ranks_a_pack} ranks, so give a multiple of {ranks_a_pack}"
            )
        return self

    @field_validator("store")
    @classmethod
    def _without_credentials(cls, store: str) -> str:
        if "://" in store and ("@" in store or "?" in store):
            # The message leaves out the URL: its credentials would go into logs.
            raise ValueError("found a URL with credentials or a query; credentials come from the environment")
        return store


class Hub(Section):
    """Where the checkpoint and its card are pushed to. Without this section nothing leaves the machine."""

    model_id: str = Field(description="owner/name; the repository is made where it is missing")
    private: bool = Field(True, description="who may see it; must agree with a repository that is there")
    revision: str = Field("main", description="the branch; made where it is missing")

    @field_validator("model_id")
    @classmethod
    def _names_a_repository(cls, model_id: str) -> str:
        owner, _, name = model_id.partition("/")
        good = all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_])?", part) for part in (owner, name))
        if not good or "--" in model_id or ".." in model_id or name.endswith(".git") or len(model_id) > 96:
            raise ValueError(
                f"found {short(model_id)}; it is owner/name, each of letters, digits, '.', '_' and '-', "
                "96 characters in all at most"
            )
        return model_id

    @field_validator("revision")
    @classmethod
    def _names_a_branch(cls, revision: str) -> str:
        is_commit = re.fullmatch(r"[0-9a-f]{40}", revision)
        if is_commit or ".." in revision or not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9_-])?", revision):
            raise ValueError(f"found {short(revision)}; it is the name of a branch, as main")
        return revision
