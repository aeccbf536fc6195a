"""Answers to token prompts by vLLM, which runs in another process and, where it has to, another environment."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sft_core.evaluate.engine import Request
from sft_core.evaluate.piped_process import PipedProcess, ProcessEnded
from sft_core.recipe.sections import VllmSettings

log = logging.getLogger(__name__)
WORKER = Path(__file__).with_name("vllm_worker.py")
HAS_VLLM = "import importlib.util as u, sys; sys.exit(sys.version_info < (3, 11) or u.find_spec('vllm') is None)"


def unmet_vllm(settings: VllmSettings) -> str | None:
    """The reason why vLLM cannot start here, and what to do; None where it can."""
    python = interpreter(settings)
    if shutil.which(python) is None:
        return f"runtime.vllm.python: found {python!r}; there is no such program"
    # -P: a folder named vllm in the working folder must not pass for the library.
    if subprocess.run([python, "-P", "-c", HAS_VLLM], env=_environment(), capture_output=True, check=False).returncode:
        return (
            f"evaluation.engine: found 'vllm', and {python} is no Python 3.11 or newer that holds it. vLLM wants other "
            "versions of libraries than training does, so give it an environment: `python -m venv vllm-env && "
            "vllm-env/bin/pip install vllm`, then set runtime.vllm.python to vllm-env/bin/python"
        )
    return None


def interpreter(settings: VllmSettings) -> str:
    return os.path.expanduser(settings.python) if settings.python else sys.executable


class WithVllm:
    """The engine (engine.py) that answers with vLLM and the model in a folder. It runs until it is closed."""

    def __init__(self, model: Path, settings: VllmSettings, *, dtype: str, trust_remote_code: bool, max_model_len: int):
        """Starts vLLM and returns once it has read the folder. Raises RuntimeError where it does not start.

        dtype: of the weights, as torch names it. max_model_len: tokens of a prompt and its answer.
        """
        settings_of_engine = {
            "model": str(model),
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "max_model_len": max_model_len,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the checkpoint's: a repetition penalty would make a copied word wrong
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "seed": 0,
        }
        # -P: the files beside the worker must not stand in for libraries.
        self._process = PipedProcess([interpreter(settings), "-P", str(WORKER)], _environment())
        self.name = f"vllm {self._reply(settings_of_engine)['version']}"
        log.info("started=%s model=%s dtype=%s max_model_len=%d", self.name, model, dtype, max_model_len)

    @property
    def is_running(self) -> bool:
        return self._process.is_running

    def close(self) -> None:
        self._process.close()

    def write(self, request: Request) -> list[np.ndarray]:
        """Raises RuntimeError where vLLM fails; the process has ended then."""
        if not request.prompts:
            return []
        shared: dict[str, object] = {
            "max_tokens": request.max_new_tokens,
            "stop_token_ids": request.stop_ids,
            "detokenize": False,
        }
        params: list[dict[str, object]] = [{"temperature": 0.0, **shared}] * len(request.prompts)
        if (sampling := request.sampling) is not None:
            shape: dict[str, object] = {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or 0,
            }
            samples = range(sampling.num_samples)
            seeds = [draw_seed(sampling.seed, key, sample) for key in request.draw_keys for sample in samples]
            params = [{"seed": seed, **shape, **shared} for seed in seeds]
        prompts = [prompt.tolist() for prompt in request.prompts for _ in range(request.num_samples)]
        return [np.array(ids, np.int64) for ids in self._reply({"prompts": prompts, "sampling": params})["answers"]]

    def _reply(self, message: Mapping[str, object]) -> Any:
        """The process's reply to a message; both are JSON objects."""
        try:
            self._process.send(json.dumps(message).encode())
            return json.loads(self._process.receive())
        except ProcessEnded as ended:
            if ended.is_killed:
                raise RuntimeError("vLLM was killed; was there memory enough?") from None
            raise RuntimeError(f"vLLM ended with exit status {ended.status}; see its error above") from None
        except BaseException:
            self._process.kill()  # or its late reply would pass for the reply to the next message
            raise


def draw_seed(seed: int, key: int, sample: int) -> int:
    """The seed of a row's sample, whatever the other rows are and however many samples there are. Below 2 ** 32."""
    return int(np.random.SeedSequence([seed, key, sample]).generate_state(1)[0])


def _environment() -> dict[str, str]:
    """The other interpreter's environment, without our search path: our libraries would win over its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with this one
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # at WARNING it prints pages about the missing tokenizer
    }
    return {**defaults, **inherited}
