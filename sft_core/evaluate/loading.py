"""The model that is scored: it is loaded when a task needs it, and `keeping_a_model` keeps it between tasks.

Invariant: the device holds one model at a time, as a network or as a vLLM engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_core.data.tokenizer.tokenizer import load_tokenizer
from sft_core.evaluate.answers import stop_ids
from sft_core.evaluate.with_vllm import WithVllm
from sft_core.train.job import ModelLoader, TokenizerLoader

if TYPE_CHECKING:
    from sft_core.recipe.sections import Runtime, VllmSettings

log = logging.getLogger(__name__)
TASKS_AT_A_TIME = 2  # a local run of the flow scores so many at once, which share the machine's cores


def use_threads(runtime: Runtime) -> None:
    """Gives torch this process's share of the cores."""
    import torch

    torch.set_num_threads(runtime.num_threads or max(1, (os.cpu_count() or 1) // TASKS_AT_A_TIME))


@dataclasses.dataclass(frozen=True)
class ModelToScore:
    """The start model; where `start` is None, the checkpoint in the output `trained`."""

    start: ModelLoader | None
    tokenizer: TokenizerLoader  # the start model's
    trained: Path | None
    attn_implementation: str
    bf16: bool
    seed: int

    @property
    def checkpoint(self) -> Path | None:
        return None if self.trained is None else self.trained / "model"

    @property
    def loaders(self) -> tuple[ModelLoader, TokenizerLoader]:
        if self.start is not None:
            return self.start, self.tokenizer
        assert self.checkpoint is not None
        path, trusts = str(self.checkpoint), self.tokenizer.trust_remote_code
        # A checkpoint has its stop tokens in its generation config, its added tokens in its tokenizer.
        model = ModelLoader(path, None, None, "auto", self.attn_implementation, [], trusts)
        return model, dataclasses.replace(self.tokenizer, path=path, revision=None, add_special_tokens=[])


@dataclasses.dataclass(frozen=True)
class Facts:
    """A model's tokenizer, and facts about its network that stay known when the network is unloaded."""

    vocabulary: Any  # the tokenizer
    stops: list[int]  # the ids at which answers end
    context: int | None  # tokens, where the config says so
    dtype: str  # as torch names it

    @classmethod
    def of(cls, network: Any, vocabulary: Any) -> Facts:
        context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
        return cls(vocabulary, stop_ids(network), context, str(network.dtype).removeprefix("torch."))


class ScoredModel:
    """A model as tasks use it: its network, or the vLLM engine that takes the network's place."""

    def __init__(self, model: ModelToScore):
        self.model = model
        self.losses: dict[tuple[str, bytes], tuple[np.ndarray, np.ndarray]] = {}  # measured ahead of answers by vLLM
        self.documents_alone = False  # whether rows that share a forward would see each other; known with the losses
        self._loader, self._tokenizer = model.loaders
        self._network: Any = None
        self._facts: Facts | None = None
        self._engine: WithVllm | None = None
        self._room = self._engine_room = 0  # tokens of the longest prompt with its answer

    @property
    def network(self) -> Any:
        """The network on its device, in evaluation mode. A caller that changes it restores it."""
        if self._network is None:
            self._end_engine()
            self._network, vocabulary = load_scored(self._loader, self._tokenizer, self.model.bf16, self.model.seed)
            self._facts = Facts.of(self._network, vocabulary)
        return self._network

    @property
    def facts(self) -> Facts:
        """The facts. The network is loaded for them at most once."""
        if self._facts is None:
            _ = self.network
        assert self._facts is not None
        return self._facts

    def engine(self, settings: VllmSettings, scratch: Path) -> WithVllm:
        """vLLM with the same weights. The network is unloaded.

        scratch: a folder with room for the start model, which is written there while vLLM reads it.
        """
        if self._engine is not None and self.is_engine_running:
            return self._engine
        self._end_engine()
        facts = self.facts
        with tempfile.TemporaryDirectory(dir=scratch) as temporary:
            folder = self.model.checkpoint
            if self.model.start is not None or folder is None:
                from sft_core.train.models.model import save_checkpoint

                save_checkpoint(self.network, facts.vocabulary, None, folder := Path(temporary))
            self._let_network_go()
            self._engine = WithVllm(
                folder,
                settings,
                dtype=facts.dtype,
                trust_remote_code=self._loader.trust_remote_code,
                max_model_len=self._room if facts.context is None else min(self._room, facts.context),
            )
        self._engine_room = self._room
        return self._engine

    def make_room(self, num_tokens: int) -> None:
        """Sets the least room of the engine, for a prompt with its answer. An engine with less room is restarted."""
        self._room = max(self._room, num_tokens)

    @property
    def is_engine_running(self) -> bool:
        """Whether vLLM runs, with as much room as tasks need."""
        return self._engine is not None and self._engine.is_running and self._engine_room >= self._room

    def close(self) -> None:
        self._end_engine()
        self._let_network_go()

    def _end_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _let_network_go(self) -> None:
        import torch

        self._network = None
        gc.collect()  # a model and its modules refer to each other
        torch.cuda.empty_cache()


def load_scored(model: ModelLoader, tokenizer: TokenizerLoader, bf16: bool, seed: int) -> tuple[Any, Any]:
    """The network on its device, in the dtype for scoring, and its tokenizer.

    bf16: all weights in bfloat16, as in serving; autocast would convert every weight again for each new token.
    """
    import torch

    from sft_core.train.models.model import load_model

    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    network: Any
    if model.config is None and not _grows(model, tokenizer):
        network, vocabulary = load_model(
            dataclasses.replace(model, dtype="bfloat16") if bf16 else model,
            tokenizer,
            seed=seed,
            half=bf16,
            device=None if device == "cpu" else device,
        )
    else:
        # Draw random numbers on the CPU, in the weights' dtype: training starts from these.
        network, vocabulary = load_model(model, tokenizer, seed=seed, half=bf16)
        if bf16:
            _cast(network, torch.bfloat16)
        network.to(device)
    log.info("loaded=%s device=%s dtype=%s", model.path or "random weights", device, network.dtype)
    return network.eval(), vocabulary


def _grows(model: ModelLoader, tokenizer: TokenizerLoader) -> bool:
    """Whether the start model's embedding gets rows for tokens that the model does not know."""
    from sft_core.train.models.model import skeleton

    shape = skeleton(
        path=model.path, revision=model.revision, config=model.config, trust_remote_code=model.trust_remote_code
    )
    return len(load_tokenizer(**vars(tokenizer))) > shape.get_input_embeddings().num_embeddings


def _cast(network: Any, dtype: Any) -> None:
    """Casts parameters and the buffers that a checkpoint holds.

    Buffers that are computed from the config stay in float32, as from_pretrained leaves them: with rounded frequencies,
    rotary embeddings turn far positions by other angles.
    """
    computed = [
        (module, name, getattr(module, name))
        for module in network.modules()
        for name in module._non_persistent_buffers_set
    ]
    network.to(dtype=dtype)
    for module, name, buffer in computed:
        setattr(module, name, buffer)


def is_device_sound() -> bool:
    """False after an error on the GPU that every later computation of this process would raise again."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        gc.collect()  # frees the tensors of the task that failed
        torch.cuda.empty_cache()
    except RuntimeError as error:
        log.error("status=device_lost %s", error)
        return False
    return True


# The model of the last task, inside `keeping_a_model`.
_keeps = False
_kept: ScoredModel | None = None


@contextlib.contextmanager
def keeping_a_model() -> Iterator[None]:
    """Inside it a model stays loaded for the next task, and is freed before another model loads."""
    global _keeps
    _keeps = True
    try:
        yield
    finally:
        _keeps = False
        _forget()


@contextlib.contextmanager
def scored_model(model: ModelToScore) -> Iterator[ScoredModel]:
    """The model, which is loaded at its network's first use and freed at the end, unless `keeping_a_model` keeps it."""
    global _kept
    if _kept is None or _kept.model != model:
        _forget()
        _kept = ScoredModel(model)
    try:
        yield _kept
    finally:
        if not _keeps:
            _forget()


def _forget() -> None:
    global _kept
    if _kept is not None:
        _kept.close()
        _kept = None
