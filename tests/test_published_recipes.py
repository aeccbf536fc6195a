"""Published recipes in configs/ say what was published, and can be planned where no hub is in reach."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sft_core.recipe.evaluation import LM_EVAL
from sft_core.recipe.parse import load_recipe
from sft_core.recipe.rank_strategies import STRATEGIES
from sft_core.recipe.recipe import Recipe
from sft_core.train import accelerator
from sft_core.train.accelerator import has_gpu, unmet_demands

ROOT = Path(__file__).resolve().parents[1]
# Weights of the splits in the handbook's recipe that are not 1.
LESS = {
    "smoltalk_smollm3_smol_magpie_ultra_no_think": 0.5,
    "OpenHermes_2.5_no_think": 0.5,
    "OpenThoughts3_1.2M_no_think_no_think": 0.4,
    "smoltalk_multilingual8_Qwen3_32B_think": 0.3,
    "OpenThoughts3_1.2M_think": 0.02,
}


@pytest.fixture(scope="module")
def smollm3() -> Recipe:
    return load_recipe(ROOT / "configs" / "smollm3.yaml")


@pytest.fixture(scope="module")
def tulu3() -> Recipe:
    return load_recipe(ROOT / "configs" / "tulu3-8b.yaml")


def test_smollm3_mixture_is_25_splits_with_their_weights(smollm3: Recipe):
    datasets = smollm3.last_phase.dataset_mixture.datasets
    assert len(datasets) == 25 and smollm3.last_phase.sources == [dataset.split for dataset in datasets]
    assert {(one.id, one.config, one.columns) for one in datasets} == {
        ("HuggingFaceTB/smoltalk2", "SFT", ("messages", "chat_template_kwargs"))
    }
    assert {dataset.split: dataset.weight for dataset in datasets if dataset.weight != 1} == LESS
    modes = [dataset.split.endswith("_no_think") for dataset in datasets]
    assert modes.count(True) == 15
    assert all(one.endswith("_think") for one in smollm3.last_phase.sources)
    assert smollm3.last_phase.dataset_mixture.seed == 0
    assert smollm3.last_phase.dataset_mixture.deduplication and smollm3.last_phase.dataset_mixture.deduplication.near
    assert smollm3.last_phase.dataset_mixture.decontamination


def test_smollm3_settings_are_the_handbooks(smollm3: Recipe):
    model, training = smollm3.model, smollm3.last_phase.training
    assert (model.model_name_or_path, model.model_revision) == ("HuggingFaceTB/SmolLM3-3B-Base", "main")
    # Otherwise than published: flash_attention_2 needs a package that is built, and auto is the same attention.
    assert (model.dtype, model.attn_implementation) == ("bfloat16", "auto")
    assert model.trust_remote_code and model.eos_token == "<|im_end|>"
    assert (smollm3.last_phase.packing.packing_strategy, smollm3.last_phase.packing.max_length) == ("ffd", 65536)
    assert (training.loss_scope, training.learning_rate, training.warmup_ratio) == ("assistant", 2e-5, 0.03)
    assert (training.lr_scheduler_type, training.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert (training.max_grad_norm, training.num_train_epochs, training.global_batch_size) == (0.2, 5, 128)
    assert training.bf16 and training.gradient_checkpointing and training.use_liger_kernel and training.seed == 42
    assert smollm3.runtime.report_to == ("wandb",)
    template = smollm3.chat_template
    assert template.template == "thinking" and template.kwargs.get("header", True)


def test_smollm3_mid_training_is_the_handbooks(smollm3: Recipe):
    mid, sft = smollm3.phases.values()
    datasets = mid.dataset_mixture.datasets
    assert [dataset.split for dataset in datasets] == [
        *("Llama_Nemotron_Post_Training_Dataset_reasoning_r1", "OpenThoughts3_1.2M")
    ]
    assert {(one.id, one.config, one.columns, one.weight) for one in datasets} == {
        ("HuggingFaceTB/smoltalk2", "Mid", ("messages",), 1.0)
    }
    assert mid.packing.max_length == 32768 and mid.training.loss_scope == "all"
    # Both stages have the same optimizer and schedule.
    assert mid.training.model_copy(update={"loss_scope": "assistant"}) == sft.training


def test_tulu3_settings_are_the_published_ones(tulu3: Recipe):
    training = tulu3.last_phase.training
    assert tulu3.model.model_name_or_path == "meta-llama/Llama-3.1-8B"
    assert [dataset.id for dataset in tulu3.last_phase.dataset_mixture.datasets] == ["allenai/tulu-3-sft-mixture"]
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_ratio) == (5e-6, "linear", 0.03)
    assert (training.weight_decay, training.num_train_epochs) == (0.0, 2)
    # 128 sequences: a pack is one row.
    assert (
        training.global_batch_size,
        tulu3.last_phase.packing.packing_strategy,
        tulu3.last_phase.packing.max_length,
    ) == (128, "none", 4096)
    assert tulu3.chat_template.template == "tulu"
    assert (tulu3.model.dtype, tulu3.model.attn_implementation) == ("float32", "auto"), "it needs no package"


def image_packages(page: str) -> set[str]:
    """Names of the packages that the page's Dockerfile asks pip for, those of our own extras among them."""
    (line,) = re.findall(r"^RUN pip install (.+)$", page, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = []
    for argument in shlex.split(line.replace("-c /sft-flow/constraints.txt", "")):
        ours = re.fullmatch(r"/sft-flow(?:\[(.+)\])?", argument)
        requirements += [argument] if ours is None else project["dependencies"]
        for extra in ((ours and ours[1]) or "").split(","):
            requirements += project["optional-dependencies"][extra] if extra else []
    return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}


def test_recipe_that_the_page_of_clusters_runs_demands_nothing_that_its_image_lacks(monkeypatch: pytest.MonkeyPatch):
    """On a cluster only the training itself looks for packages: a lack would show after all data work."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    (name,) = set(re.findall(r"--config recipe (configs/\S+\.yaml)", page))
    packages, recipe = image_packages(page), load_recipe(ROOT / name)
    assert {"torch", "s3fs"} <= packages

    def find_spec(module: str) -> object:
        return object() if module.replace("_", "-") in packages else None

    monkeypatch.setattr(accelerator.importlib.util, "find_spec", find_spec)
    for phase in recipe.phases:
        keys = recipe.for_phase(phase)
        assert unmet_demands(keys, on_gpu=True) is None
        assert keys.training.use_liger_kernel is not True or "liger-kernel" in packages
        assert "deepspeed" in packages or not STRATEGIES[keys.runtime.distributed].zero_stages
    assert {*recipe.runtime.report_to} <= packages
    assert recipe.evaluation.engine == "transformers" and not any(task.startswith(LM_EVAL) for task in recipe.scored)


@pytest.fixture(scope="module")
def msft_paper() -> Recipe:
    return load_recipe(ROOT / "configs" / "msft-paper.yaml")


def test_msft_paper_settings_are_the_published_ones(msft_paper: Recipe):
    training, search = msft_paper.last_phase.training, msft_paper.last_phase.search
    datasets = msft_paper.last_phase.dataset_mixture.datasets
    assert len(datasets) == 10 and {dataset.num_rows for dataset in datasets} == {1800}
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_ratio) == (1e-5, "constant", 0.0)
    assert (training.weight_decay, training.max_grad_norm, training.extra) == (0.0, 0.0, {})
    # 64 rows: a pack is one row. Small updates at this rate want fp32 weights.
    assert (training.global_batch_size, msft_paper.last_phase.packing.packing_strategy) == (64, "none")
    assert (msft_paper.model.dtype, training.bf16) == ("float32", True)
    assert search is not None
    assert (search.strategy, search.preset, search.evaluations_per_epoch) == ("msft", "paper", 4)
    assert (search.max_rollouts, search.max_epochs, search.max_idle) == (10, None, None)
    assert (
        msft_paper.last_phase.dataset_mixture.selection_share > 0
        and msft_paper.last_phase.dataset_mixture.report_share > 0
    )


PLAN = """
import sys
from steps.cli.main import main
main(["plan", sys.argv[1], "--set", "runtime.store=" + sys.argv[2]], standalone_mode=False)
print("imported:", sorted({"torch", "transformers", "trl", "datasets", "metaflow"} & set(sys.modules)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_sources", "demand"), [("smollm3", 27, "training.use_liger_kernel: true"), ("tulu3-8b", 1, None)]
)
def test_published_recipe_is_planned_without_a_network_in_seconds_and_a_line_says_why(
    tmp_path: Path, name: str, num_sources: int, demand: str | None
):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9"}  # a port at which nobody listens
    done = subprocess.run(
        [sys.executable, "-c", PLAN, f"configs/{name}.yaml", str(tmp_path / "store")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    line, *others = done.stderr.splitlines()
    demands = [] if demand is None or has_gpu() else [demand]
    assert len(others) == len(demands)
    for other, demanded in zip(others, demands, strict=True):
        assert demanded in other and "needs a GPU, and this machine has none" in other
    assert line.startswith("cannot compute keys that depend on dataset ") and "the hub cannot be reached" in line
    assert line.count("dataset ") == line.count("model ") == 1
    assert load_recipe(ROOT / "configs" / f"{name}.yaml").model.model_name_or_path in line
    stages = [row.split()[:1] for row in done.stdout.splitlines() if row.endswith("depends")]
    assert stages.count(["conversations"]) == num_sources
    assert done.stdout.splitlines()[-1] == "imported: []", "what takes seconds to import"
