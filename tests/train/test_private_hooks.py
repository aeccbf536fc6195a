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
# All names in sft_core that a library calls private, by the library.
PRIVATE = {
    "torch": {
        *("_buffers", "_parameters", "_non_persistent_buffers_set"),  # of modules
        "_cdata",  # of storages: which of them are one
        *("aten._grouped_mm", "aten._to_copy"),
        *("torch._subclasses.fake_tensor", "torch.utils._python_dispatch", "torch.utils._pytree"),
    },
    "transformers": {
        *("_attn_implementation", "_can_set_attn_implementation", "_supports_flash_attn", "_supports_sdpa"),
        *("_get_grad_norm", "_load_best_model", "_save_checkpoint", "_tr_loss"),
    },
    "fsspec": {"_strip_protocol"},
    "jinja2": {"_Namespace__attrs"},
    "lm_eval": {"_encode_pair", "_loglikelihood_tokens"},
}
# Of transformers.Trainer: what PackTrainer overrides, calls or sets.
TRAINER = {
    "_get_grad_norm",
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
    Trainer._get_grad_norm: ["self", "model", "grad_norm"],
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


def foreign_names(source: str) -> set[str]:
    """The private attributes that the source takes of what it does not define, and the private modules it imports."""
    nodes = [*ast.walk(ast.parse(source))]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names, imports = set(), set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            defined.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            imports |= {module for module in modules if has_private_part(module)}
        elif isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names if has_private_part(alias.name)}
    for node in nodes:
        if not isinstance(node, ast.Attribute) or not has_private_part(node.attr) or node.attr in OF_NAMED_TUPLES:
            continue
        owner = ast.unparse(node.value)
        if owner.startswith("super(") or node.attr not in defined:
            names.add(f"aten.{node.attr}" if owner == "torch.ops.aten" else node.attr)
    outermost = {name for name in imports if not any(name.startswith(f"{other}.") for other in imports)}
    return names | outermost


OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public, says their documentation


def has_private_part(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def test_private_names_of_libraries_that_are_used_are_these() -> None:
    sources = [path.read_text() for path in sorted((ROOT / "sft_core").rglob("*.py"))]
    assert len(sources) > 100
    assert set().union(*map(foreign_names, sources)) == set().union(*PRIVATE.values())


def test_scan_of_private_names_sees_each_kind() -> None:
    source = "from a._b import c\nimport d._e\nfrom f import _g\nx._h\nclass K:\n  def _own(self):\n"
    source += "    self._mine = self._own()\n    super()._own()\n    torch.ops.aten._op(self._theirs)\n"
    assert foreign_names(source) == {"a._b", "d._e", "f._g", "_h", "_own", "aten._op", "_theirs"}


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
