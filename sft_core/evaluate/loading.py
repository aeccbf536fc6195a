"""The model that is scored, loaded when it is asked for; between tasks it is kept where a process says so.

Invariant: a model's network and its vLLM engine are never on the device together, and no model is while another is.
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

from sft_core.data.tokenizer import load_tokenizer
from sft_core.evaluate.answers import stop_ids
from sft_core.evaluate.with_vllm import WithVllm

if TYPE_CHECKING:
    from sft_core.sections import Runtime, VllmSettings

log = logging.getLogger(__name__)
TASKS_AT_A_TIME = 2  # as many share a machine's cores where the flow runs locally


def use_threads(runtime: Runtime) -> None:
    """This process's share of the cores, for torch."""
    import torch

    torch.set_num_threads(runtime.num_threads or max(1, (os.cpu_count() or 1) // TASKS_AT_A_TIME))


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a task asks of a model besides its network."""

    vocabulary: Any  # the tokenizer
    stops: list[int]  # the ids at which answers end
    context: int | None  # tokens, where the config says so
    dtype: str  # as torch names it

    @classmethod
    def of(cls, network: Any, vocabulary: Any) -> Facts:
        context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
        return cls(vocabulary, stop_ids(network), context, str(network.dtype).removeprefix("torch."))


class ScoredModel:
    """The start model, or without one (None) the checkpoint in `trained`."""

    def __init__(
        self,
        trained: Path | None,
        model: dict[str, Any] | None,
        tokenizer: dict[str, Any],
        *,
        attn_implementation: str,
        bf16: bool,
        seed: int,
    ):
        self.identity = (trained, model, tokenizer, attn_implementation, bf16, seed)
        self.losses: dict[Any, tuple[np.ndarray, np.ndarray]] = {}  # measured ahead of answers by vLLM
        self._folder: Path | None = None if trained is None else trained / "model"
        if model is None:
            assert self._folder is not None
            tokenizer = {**tokenizer, "path": str(self._folder), "revision": None, "add_special_tokens": []}
            model = {
                "path": str(self._folder),
                "revision": None,
                "config": None,
                "dtype": "auto",
                "attn_implementation": attn_implementation,
                "stop_tokens": [],  # in the checkpoint's generation config
                "trust_remote_code": tokenizer["trust_remote_code"],
            }
        self._model, self._tokenizer, self._bf16, self._seed = model, tokenizer, bf16, seed
        self._network: Any = None
        self._facts: Facts | None = None
        self._engine: WithVllm | None = None
        self._room = self._engine_room = 0  # tokens of the longest prompt with its answer

    @property
    def network(self) -> Any:
        """On its device, ready to be asked. Whoever changes it leaves it as it was."""
        if self._network is None:
            self._end_engine()
            self._network, vocabulary = load_scored(self._model, self._tokenizer, self._bf16, self._seed)
            self._facts = Facts.of(self._network, vocabulary)
        return self._network

    @property
    def facts(self) -> Facts:
        """Known from the first load on, also when the network is let go."""
        if self._facts is None:
            _ = self.network
        assert self._facts is not None
        return self._facts

    def engine(self, settings: VllmSettings, scratch: Path) -> WithVllm:
        """vLLM with the same weights; the network's memory is given back.

        scratch: a folder with room for the start model, which is written there for as long as vLLM reads it.
        """
        if self._engine is not None and self.is_engine_running:
            return self._engine
        self._end_engine()
        facts = self.facts
        with tempfile.TemporaryDirectory(dir=scratch) as made:
            folder = self._folder
            if folder is None:
                from sft_core.train.model import save_checkpoint

                save_checkpoint(self.network, facts.vocabulary, None, folder := Path(made))
            self._let_network_go()
            self._engine = WithVllm(
                folder,
                settings,
                dtype=facts.dtype,
                trust_remote_code=self._model["trust_remote_code"],
                max_model_len=self._room if facts.context is None else min(self._room, facts.context),
            )
        self._engine_room = self._room
        return self._engine

    def make_room(self, num_tokens: int) -> None:
        """Of an engine, for a prompt with its answer. One that has less is started anew when it is asked for."""
        self._room = max(self._room, num_tokens)

    @property
    def is_engine_running(self) -> bool:
        """With as much room as is wanted."""
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


def load_scored(model: dict[str, Any], tokenizer: dict[str, Any], bf16: bool, seed: int) -> tuple[Any, Any]:
    """The network on its device, in the dtype in which it is scored, and its tokenizer.

    In bfloat16 throughout, as it is served: autocast would convert every weight again for each new token.
    """
    import torch

    from sft_core.train.job import ModelLoader, TokenizerLoader
    from sft_core.train.model import load_model

    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    wanted = "bfloat16" if bf16 else model["dtype"]
    network: Any
    if model["config"] is None and not _grows(model, tokenizer):
        network, vocabulary = load_model(
            ModelLoader(**{**model, "dtype": wanted}),
            TokenizerLoader(**tokenizer),
            seed=seed,
            half=bf16,
            device=None if device == "cpu" else device,
        )
    else:
        # Random numbers are those that training starts from: drawn on the CPU, in the weights' own dtype.
        network, vocabulary = load_model(ModelLoader(**model), TokenizerLoader(**tokenizer), seed=seed, half=bf16)
        if bf16:
            _cast(network, torch.bfloat16)
        network.to(device)
    log.info("loaded=%s device=%s dtype=%s", model["path"] or "random weights", device, network.dtype)
    return network.eval(), vocabulary


def _grows(model: dict[str, Any], tokenizer: dict[str, Any]) -> bool:
    """Whether the start model gets rows of its own for tokens that it does not know."""
    from sft_core.train.model import skeleton

    shape = skeleton(**{name: model[name] for name in ("path", "revision", "config", "trust_remote_code")})
    return len(load_tokenizer(**tokenizer)) > shape.get_input_embeddings().num_embeddings


def _cast(network: Any, dtype: Any) -> None:
    """Casts what a checkpoint holds. What is computed from the config stays in float32, as from_pretrained leaves it:
    the frequencies of rotary embeddings, rounded, turn far positions to others."""
    computed = [
        (module, name, getattr(module, name))
        for module in network.modules()
        for name in module._non_persistent_buffers_set
    ]
    network.to(dtype=dtype)
    for module, name, buffer in computed:
        setattr(module, name, buffer)


def is_device_sound() -> bool:
    """False after an error on a GPU that all that is computed in this process from now on would meet."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        gc.collect()  # of what failed
        torch.cuda.empty_cache()
    except RuntimeError as error:
        log.error("status=device_lost %s", error)
        return False
    return True


# One model is kept, where `keeping_a_model` is entered: that of the last task.
_keeps = False
_kept: ScoredModel | None = None


@contextlib.contextmanager
def keeping_a_model() -> Iterator[None]:
    """The model of a task is there for the next one that asks for the same, and let go before another is loaded."""
    global _keeps
    _keeps = True
    try:
        yield
    finally:
        _keeps = False
        _forget()


@contextlib.contextmanager
def scored_model(
    trained: Path | None, model: dict[str, Any] | None, tokenizer: dict[str, Any], **settings: Any
) -> Iterator[ScoredModel]:
    """What a task scores; see ScoredModel. It is let go at the end unless it is kept for the next task."""
    global _kept
    asked = ScoredModel(trained, model, tokenizer, **settings)
    if _kept is None or _kept.identity != asked.identity:
        _forget()
        _kept = asked
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
