"""Answers by vLLM, in a process and an environment of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

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


@contextlib.contextmanager
def gpu_by_itself() -> Iterator[None]:
    """One task of this machine at a time: vLLM takes a share of the GPU's whole memory, and fails where it is taken."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(",", "-")
    lock = FileLock(Path(tempfile.gettempdir()) / f"sft-flow-vllm-{os.getuid()}-{devices}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting: another task's vLLM has the GPU")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def moved_to_vllm(
    network: Any, tokenizer: Any, folder: Path | None, settings: VllmSettings, trust_remote_code: bool, scratch: Path
) -> Iterator[WithVllm]:
    """The engine that answers with the weights of a loaded model, whose memory is given back: it is spent.

    folder: where the same weights lie; None to save them below `scratch` for as long as this is open.
    """
    import torch

    from sft_core.train.model import save_checkpoint

    dtype = str(network.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory(dir=scratch) as made:  # where there is room for a model
        if folder is None:
            save_checkpoint(network, tokenizer, None, folder := Path(made))
        network.to("meta")
        torch.cuda.empty_cache()
        yield WithVllm(folder, settings, dtype=dtype, trust_remote_code=trust_remote_code)


class WithVllm:
    """Greedy or drawn answers of the model in a folder; see answers.Engine."""

    def __init__(self, model: Path, settings: VllmSettings, *, dtype: str, trust_remote_code: bool):
        """dtype: as torch names it, in which the weights are used."""
        self._model, self._settings = model, settings
        self._dtype, self._trust_remote_code = dtype, trust_remote_code
        self.name = "vllm"

    def write(
        self,
        prompts: list[np.ndarray],
        keys: list[int],
        sampling: dict[str, Any] | None,
        *,
        stop_ids: list[int],
        max_new_tokens: int,
    ) -> list[np.ndarray]:
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
        return self._run(prompts, params, longest=max(map(len, prompts)) + max_new_tokens)

    def _run(self, prompts: list[np.ndarray], params: list[dict[str, Any]], longest: int) -> list[np.ndarray]:
        engine = {
            "model": str(self._model),
            "dtype": self._dtype,
            "trust_remote_code": self._trust_remote_code,
            "max_model_len": longest,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the checkpoint's: a repetition penalty would make a copied word wrong
            "tensor_parallel_size": self._settings.tensor_parallel_size,
            "gpu_memory_utilization": self._settings.gpu_memory_utilization,
            "seed": 0,
        }
        asked = {"engine": engine, "prompts": [prompt.tolist() for prompt in prompts], "sampling": params}
        with tempfile.TemporaryDirectory() as folder:
            job, out = Path(folder) / "job.json", Path(folder) / "answers.json"
            job.write_text(json.dumps(asked))
            # -P: the files beside the worker must not stand in for libraries.
            command = [interpreter(self._settings), "-P", str(WORKER), str(job), str(out), str(os.getpid())]
            ended = subprocess.run(command, env=_environment(), check=False)
            if ended.returncode:
                raise RuntimeError(f"vLLM ended with exit status {ended.returncode}; see its error above")
            told = json.loads(out.read_text())
        self.name = f"vllm {told['version']}"
        return [np.array(ids, np.int64) for ids in told["answers"]]


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
