"""What of the libraries is used though it is private to them, in one place: a new version is held against this list."""

import ast
import inspect
import tomllib
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel, Trainer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import SFTTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

ROOT = Path(__file__).resolve().parents[2]
# Of transformers.Trainer: what PackTrainer overrides, calls or sets.
TRAINER = {
    "_get_num_items_in_batch",
    "_get_train_sampler",
    "_globalstep_last_logged",
    "_load_best_model",
    "_prepare_inputs",
    "_save_checkpoint",
    "_tr_loss",
}
OF_MODEL = {"_can_set_attn_implementation", "_supports_flash_attn", "_supports_sdpa"}
SIGNATURES = {
    Trainer.get_batch_samples: ["self", "epoch_iterator", "num_batches", "device"],
    Trainer._get_num_items_in_batch: ["self", "batch_samples", "device"],
    Trainer.compute_loss: ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    Trainer._save_checkpoint: ["self", "model", "trial"],
    Trainer.floating_point_ops: ["self", "inputs"],
    Trainer._prepare_inputs: ["self", "inputs"],
    load_balancing_loss_func: ["gate_logits", "num_experts", "top_k", "attention_mask"],
    maybe_gather_lm_head_ctx: ["params"],
    ChunkedLogProbFunction.forward: [
        *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
        *("final_logit_softcapping", "logit_scale", "outputs"),
    ],
}


def private_names(source: str) -> set[str]:
    attributes = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    defined = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    return {name for name in attributes | defined if name.startswith("_") and not name.startswith("__")}


def test_trainers_private_names_that_are_used_are_these() -> None:
    theirs = private_names(inspect.getsource(Trainer)) | private_names(inspect.getsource(SFTTrainer))
    ours = private_names((ROOT / "sft_core" / "train" / "trainer.py").read_text())
    assert (ours & theirs) - {"_attn_implementation"} == TRAINER  # which is the config's
    assert {name for name in OF_MODEL if hasattr(PreTrainedModel, name)} == OF_MODEL


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signature_is_the_known_one(function: object) -> None:
    assert list(inspect.signature(function).parameters) == SIGNATURES[function]  # type: ignore[index, arg-type]


def test_varlen_kernel_takes_what_is_given_to_it() -> None:
    taken = {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size"}
    assert taken <= set(inspect.signature(varlen_attn).parameters)
    from sft_core.train.models.attention import VARLEN

    assert VARLEN in ALL_ATTENTION_FUNCTIONS.valid_keys()


def test_loader_gives_batch_i_to_rank_i_modulo_the_ranks() -> None:
    sampler = torch.utils.data.BatchSampler(range(12), batch_size=2, drop_last=False)
    by_rank = [list(BatchSamplerShard(sampler, num_processes=3, process_index=rank)) for rank in range(3)]
    assert by_rank == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]


def test_the_libraries_have_upper_bounds() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for library in ("transformers", "trl", "accelerate"):
        (bound,) = [one for one in dependencies if one.startswith(f"{library}>")]
        assert ",<" in bound
