"""Answers by vLLM, in a process and an environment of its own."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sft_core.evaluate.piped_process import PipedProcess, ProcessEnded
from sft_core.sections import VllmSettings

log = logging.getLogger(__name__)
WORKER = Path(__file__).with_name("vllm_worker.py")
FINDS = "import importlib.util, sys; sys.exit(sys.version_info < (3, 11) or importlib.util.find_spec('vllm') is None)"


def unmet_vllm(settings: VllmSettings) -> str | None:
    """Why no vLLM can be started here, and what to do."""
    python = interpreter(settings)
    if shutil.which(python) is None:
        return f"runtime.vllm.python: found {python!r}; there is no such program"
    # -P: a folder named vllm where this runs is none.
    if subprocess.run([python, "-P", "-c", FINDS], env=_environment(), capture_output=True, check=False).returncode:
        return (
            f"evaluation.engine: found 'vllm', and {python} is no Python 3.11 or newer that holds it. vLLM wants other "
            "versions of libraries than training does, so give it an environment: `python -m venv vllm-env && "
            "vllm-env/bin/pip install vllm`, then set runtime.vllm.python to vllm-env/bin/python"
        )
    return None


def interpreter(settings: VllmSettings) -> str:
    return os.path.expanduser(settings.python) if settings.python else sys.executable


class WithVllm:
    """Greedy or drawn answers of the model in a folder, by an engine that stays up until it is closed; see
    answers.Engine."""

    def __init__(self, model: Path, settings: VllmSettings, *, dtype: str, trust_remote_code: bool, max_model_len: int):
        """Starts it; when this returns, the folder is read. Raises RuntimeError where it does not start.

        dtype: as torch names it, in which the weights are used. max_model_len: tokens of a prompt and its answer.
        """
        engine = {
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
        self.name = f"vllm {self._asked(engine)['version']}"
        log.info("started=%s model=%s dtype=%s max_model_len=%d", self.name, model, dtype, max_model_len)

    @property
    def is_running(self) -> bool:
        return self._process.is_running

    def close(self) -> None:
        self._process.close()

    def write(
        self,
        prompts: list[np.ndarray],
        keys: list[int],
        sampling: dict[str, Any] | None,
        *,
        stop_ids: list[int],
        max_new_tokens: int,
    ) -> list[np.ndarray]:
        """As answers.Engine. Raises RuntimeError where vLLM fails; it is not running then."""
        if not prompts:
            return []
        shared = {"max_tokens": max_new_tokens, "stop_token_ids": stop_ids, "detokenize": False}
        params: list[dict[str, Any]] = [{"temperature": 0.0, **shared}] * len(prompts)
        if sampling is not None:
            shape = {
                "temperature": sampling["temperature"],
                "top_p": sampling["top_p"],
                "top_k": sampling["top_k"] or 0,
            }
            samples = range(sampling["num_samples"])
            seeds = [draw_seed(sampling["seed"], key, sample) for key in keys for sample in samples]
            params = [{"seed": seed, **shape, **shared} for seed in seeds]
            prompts = [prompt for prompt in prompts for _ in samples]
        asked = {"prompts": [prompt.tolist() for prompt in prompts], "sampling": params}
        return [np.array(ids, np.int64) for ids in self._asked(asked)["answers"]]

    def _asked(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            self._process.send(json.dumps(message).encode())
            return json.loads(self._process.receive())
        except ProcessEnded as ended:
            if ended.is_killed:
                raise RuntimeError("vLLM was killed; was there memory enough?") from None
            raise RuntimeError(f"vLLM ended with exit status {ended.status}; see its error above") from None
        except BaseException:
            self._process.kill()  # its answer to this would be taken for that to the next
            raise


def draw_seed(seed: int, key: int, sample: int) -> int:
    """Of each row and sample its own, whatever the other rows and the number of samples. Below 2 ** 32."""
    return int(np.random.SeedSequence([seed, key, sample]).generate_state(1)[0])


def _environment() -> dict[str, str]:
    """What the other interpreter may see: our search path would bring our libraries along."""
    mine = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with this one
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # it warns, for pages, that it has no tokenizer
    }
    return {**own, **mine}
