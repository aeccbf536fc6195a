"""`sft import`: what becomes of each key of a TRL or alignment-handbook recipe; nothing is lost in silence."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sft_core.recipe.parse import load_recipe, parse_recipe, read_yaml
from steps.importer.account import Imported
from steps.importer.recipe import import_recipe

HANDBOOK = """
# Model arguments
model_name_or_path: org/base-3b
model_revision: mid-training
torch_dtype: bfloat16
attn_implementation: flash_attention_2
trust_remote_code: true
eos_token: <|im_end|>

# Data training arguments
chat_template: "{% for m in messages %}<|im_start|>{{ m['role'] }}\\n{{ m['content'] }}<|im_end|>\\n{% endfor %}"
dataset_mixture:
  datasets:
  - id: org/mixture
    config: SFT
    split: everyday_no_think
    columns: [messages, chat_template_kwargs]
    weight: 1.0
  - id: org/mixture
    config: SFT
    split: puzzles_think
    columns:
    - messages
    - chat_template_kwargs
    weight: 0.02
  seed: 7
  test_split_size: 0.005
dataset_num_proc: 12

# SFT trainer config
assistant_only_loss: true
average_tokens_across_devices: true
bf16: true
ddp_timeout: 18000
do_eval: false
eval_strategy: 'no'
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: true
hub_strategy: every_save
learning_rate: 2.0e-05
log_level: info
logging_steps: 1
logging_strategy: steps
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_grad_norm: 0.2
max_length: 65536
max_steps: -1
num_train_epochs: 5
output_dir: data/base-3b-sft
overwrite_output_dir: true
packing: true
packing_strategy: bfd
per_device_train_batch_size: 1
push_to_hub: true
report_to:
- wandb
run_name: base-3b-sft
save_strategy: epoch
save_total_limit: 1
seed: 1
use_liger_kernel: true
warmup_ratio: 0.03
"""
TRL = """
model_name_or_path: org/small
dtype: bfloat16
dataset_name: org/chats
dataset_config: default
dataset_train_split: train_sft
dataset_test_split: test_sft
output_dir: out
learning_rate: 1.0e-5
lr_scheduler_type: linear
warmup_steps: 7
max_steps: 100
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
packing: no
completion_only_loss: yes
adam_beta2: 0.98
optim: adamw_torch
torch_compile: no
dataloader_num_workers: "2"
use_peft: true
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
lora_modules_to_save: [lm_head]
load_in_4bit: true
logging_steps: 0.1
save_steps: 100
report_to: none
eval_strategy: steps
eval_steps: 50
beta: 0.1
hub_token: hf_Sesame0123456789
env: {WANDB_API_KEY: wandbSesame0123456789}
"""
SECRETS = ("hf_Sesame0123456789", "wandbSesame0123456789")


def imported(text: str, output: str = "mine.yaml", num_processes: int = 1) -> Imported:
    found = import_recipe(read_yaml(text), output=Path(output), num_processes=num_processes)
    assert parse_recipe(found.data)
    return found


def change(text: str, **keys: Any) -> str:
    """The recipe with keys set as they would be in YAML; None takes one out."""
    data = read_yaml(text) | keys
    return json.dumps({key: value for key, value in data.items() if value is not None})


MINIMAL = "model_name_or_path: org/small\ndataset_name: org/chats\n"


def test_handbook_recipe_is_what_the_file_says():
    found = imported(HANDBOOK, num_processes=64)
    assert found.data == {
        "name": "base-3b-sft",
        "model": {
            "model_name_or_path": "org/base-3b",
            "model_revision": "mid-training",
            "dtype": "bfloat16",
            "attn_implementation": "flash_attention_2",
            "trust_remote_code": True,
            "eos_token": "<|im_end|>",
        },
        "chat_template": {"template": "mine.jinja"},
        "dataset_mixture": {
            "seed": 7,
            "report_share": 0.005,
            "datasets": [
                {
                    "id": "org/mixture",
                    "config": "SFT",
                    "split": split,
                    "columns": ["messages", "chat_template_kwargs"],
                    "weight": weight,
                }
                for split, weight in (("everyday_no_think", 1.0), ("puzzles_think", 0.02))
            ],
        },
        "packing": {"packing_strategy": "ffd", "max_length": 65536, "over_long": "truncate"},
        "training": {
            "loss_scope": "assistant",
            "learning_rate": 2e-5,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_ratio": 0.03,
            "num_train_epochs": 5,
            "global_batch_size": 128,
            "max_grad_norm": 0.2,
            "bf16": True,
            "gradient_checkpointing": True,
            "use_liger_kernel": True,
            "seed": 1,
            "extra": {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        },
        "runtime": {"logging_steps": 1, "report_to": ["wandb"]},
    }
    assert found.template == read_yaml(HANDBOOK)["chat_template"]
    assert "over the whole mixture" in found.changed["packing_strategy"][1]
    assert "64 processes" in found.changed["gradient_accumulation_steps"][1]
    assert "truncate" not in found.changed and "packing.over_long" in found.assumed


def test_trl_recipe_is_what_the_file_says_and_its_defaults_are_trls():
    found = imported(TRL, num_processes=2)
    data = found.data
    assert data["name"] == "mine" and data["model"] == {"model_name_or_path": "org/small", "dtype": "bfloat16"}
    assert data["dataset_mixture"] == {
        "datasets": [{"id": "org/chats", "config": "default", "split": "train_sft"}],
        "report_share": 0.05,
    }
    assert data["packing"] == {"packing_strategy": "none", "max_length": 1024, "over_long": "truncate"}
    training = data["training"]
    assert training["loss_scope"] == "completion" and training["global_batch_size"] == 64
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    assert training["lora"] == {**lora, "load_in_4bit": True}
    assert training["extra"] == {
        "adam_beta2": 0.98,
        "optim": "adamw_torch",
        "torch_compile": False,
        "dataloader_num_workers": 2,
    }
    assert (training["num_train_epochs"], training["bf16"], training["gradient_checkpointing"]) == (3.0, True, True)
    assert training["learning_rate"] == 1e-5 and training["max_steps"] == 100
    assert math.ceil(training["warmup_ratio"] * 100) == 7
    assert data["runtime"] == {"save_steps": 100}
    assert {key for key in found.assumed if key.startswith("training.")} == {
        *(
            "training.num_train_epochs",
            "training.bf16",
            "training.gradient_checkpointing",
            "training.lora.lora_dropout",
        ),
        "training.lora.load_in_4bit",
    }
    assert set(found.not_carried) == {
        *("dataset_test_split", "output_dir", "lora_modules_to_save", "logging_steps"),
        *("eval_strategy", "eval_steps", "beta", "hub_token", "env"),
    }
    assert "no field of trl.SFTConfig" in found.not_carried["beta"]


def test_recipe_that_says_next_to_nothing_has_trls_defaults():
    found = imported(MINIMAL)
    assert found.data["training"] == {
        "loss_scope": "all",
        "global_batch_size": 8,
        "warmup_ratio": 0.0,
        "lr_scheduler_type": "linear",
        "num_train_epochs": 3.0,
        "bf16": True,
        "gradient_checkpointing": True,
    }
    assert set(found.carried) == {"model_name_or_path", "dataset_name"}
    assert not found.changed and not found.not_carried


def test_defaults_are_those_of_the_installed_trl():
    from trl import ModelConfig, SFTConfig

    defaults = {
        field.name: field.default for field in (*dataclasses.fields(SFTConfig), *dataclasses.fields(ModelConfig))
    }
    found = imported(MINIMAL).data
    training, packing = found["training"], found["packing"]
    assert packing["max_length"] == defaults["max_length"] and defaults["packing"] is False
    assert training["num_train_epochs"] == defaults["num_train_epochs"]
    assert training["global_batch_size"] == defaults["per_device_train_batch_size"]
    assert defaults["gradient_accumulation_steps"] == 1
    assert training["lr_scheduler_type"] == getattr(
        defaults["lr_scheduler_type"], "value", defaults["lr_scheduler_type"]
    )
    assert training["warmup_ratio"] == defaults["warmup_steps"]
    assert training["gradient_checkpointing"] is defaults["gradient_checkpointing"] is True
    assert defaults["bf16"] is None, "which means true without fp16"
    assert (defaults["assistant_only_loss"], defaults["completion_only_loss"]) == (False, None)
    ours = parse_recipe(found)
    for key in ("learning_rate", "weight_decay", "max_grad_norm", "seed"):
        assert getattr(ours.last_phase.training, key) == defaults[key]
    lora = imported(change(MINIMAL, use_peft=True)).data["training"]["lora"]
    assert lora["lora_dropout"] == defaults["lora_dropout"]
    assert (ours.last_phase.training.lora, defaults["use_peft"]) == (None, False)
    lora_defaults = parse_recipe(imported(change(MINIMAL, use_peft=True)).data).last_phase.training.lora
    assert (lora_defaults.r, lora_defaults.lora_alpha) == (defaults["lora_r"], defaults["lora_alpha"])


# Data


def test_trl_list_of_datasets_and_local_files():
    several = [
        {"path": "org/a", "name": "en", "split": "train", "columns": ["messages"], "fraction": 0.5},
        {"path": "org/b", "data_dir": "x", "streaming": True, "split": None},
        {"path": "json", "data_files": {"train": ["x/*.jsonl"], "test": "y.jsonl"}, "split": "train"},
        {"path": "parquet", "data_files": "z.parquet"},
    ]
    found = imported(json.dumps({"model_name_or_path": "a/b", "datasets": several, "dataset_name": "org/ignored"}))
    assert found.data["dataset_mixture"]["datasets"] == [
        {"id": "org/a", "config": "en", "split": "train", "columns": ["messages"]},
        {"id": "org/b"},
        {"path": ["x/*.jsonl"]},
        {"path": "z.parquet"},
    ]
    reasons = {key: found.not_carried[key] for key in ("datasets[0].fraction", "datasets[1].data_dir", "dataset_name")}
    assert (
        "in proportion to the other" in reasons["datasets[0].fraction"]
        and reasons["dataset_name"] == "datasets is given"
    )
    assert set(found.not_carried) == {*reasons, "datasets[1].streaming", "datasets[1].split"}
    assert found.changed["datasets[2].data_files"][0] == "dataset_mixture.datasets[2].path"


def test_datasets_of_one_name_get_their_own():
    datasets = [
        {"id": "org/a", "split": "train_sft"},
        {"id": "org/b", "split": "train_sft"},
        {"id": "org/b", "split": "train_sft"},
        {"id": "org/c", "split": "test_sft"},
        {"id": "org/d", "config": "x", "split": "mixture"},
    ]
    found = imported(json.dumps({"model_name_or_path": "a/b", "dataset_mixture": {"datasets": datasets}}))
    names = ["a_train_sft", "b_train_sft", "b_train_sft_2", "test_sft", "d_x_mixture"]
    assert parse_recipe(found.data).sources == names
    assert "name" not in found.data["dataset_mixture"]["datasets"][3]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"dataset_name": "a/b"}, "model_name_or_path: missing"),
        ({"model_name_or_path": "a/b"}, "dataset_mixture, datasets or dataset_name: missing"),
        ({"model_name_or_path": "a/b", "dataset_mixture": {"seed": 1}}, "dataset_mixture.datasets: missing"),
        ({"model_name_or_path": "a/b", "dataset_mixture": {"datasets": []}}, "at least one dataset"),
        (
            {"model_name_or_path": "a/b", "dataset_mixture": {"datasets": ["x"]}},
            "datasets[0]: found 'x'; it is a mapping",
        ),
        ({"model_name_or_path": "a/b", "dataset_mixture": {"datasets": [{}]}}, "datasets[0].id: found None"),
        (
            {"model_name_or_path": "a/b", "dataset_name": "a/b", "dataset_train_split": "a+b"},
            "a dataset for each split",
        ),
        ({"model_name_or_path": "a/b", "datasets": [{"path": "json", "data_files": 5}]}, "it names files"),
    ],
)
def test_recipe_without_model_or_data_is_refused(data: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        import_recipe(data, output=Path("mine.yaml"))
    assert message in str(error.value)


# The command


def test_import_command_writes_recipe_and_template_and_tells_each_key(sft, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text(HANDBOOK)
    told = sft("import", "sft.yaml", "--output", "mine.yaml", "--num-processes", 64).stdout
    recipe = load_recipe("mine.yaml")
    assert recipe.last_phase.training.global_batch_size == 128 and recipe.sources == [
        "everyday_no_think",
        "puzzles_think",
    ]
    assert recipe.chat_template.template == "mine.jinja"
    assert Path("mine.jinja").read_text() == read_yaml(HANDBOOK)["chat_template"]
    lines = told.splitlines()
    assert all(any(key in line for line in lines) for key in read_yaml(HANDBOOK) if key != "dataset_mixture")
    assert "dataset_mixture.datasets[].weight (2 times)" in told and "wrote mine.yaml and mine.jinja" in told
    text = Path("mine.yaml").read_text()
    assert "  # 1 a device x 2 accumulated x 64 processes" in text and text.startswith(
        "# From sft.yaml by `sft import`"
    )


def test_import_command_shows_and_writes_no_secret(sft, tmp_path: Path):
    (tmp_path / "trl.yaml").write_text(TRL)
    told = sft("import", tmp_path / "trl.yaml", "--output", tmp_path / "mine.yaml").stdout
    assert (
        "hub_token: a recipe is stored with what it makes; set HF_TOKEN" in told
        and "  env: environment variables" in told
    )
    assert not [secret for secret in SECRETS if secret in told + (tmp_path / "mine.yaml").read_text()]


@pytest.mark.parametrize("existing", ["mine.yaml", "mine.jinja"])
def test_import_command_replaces_no_file(sft, tmp_path: Path, existing: str):
    (tmp_path / "sft.yaml").write_text(HANDBOOK)
    (tmp_path / existing).write_text("mine")
    message = sft("import", tmp_path / "sft.yaml", "--output", tmp_path / "mine.yaml", code=1).stderr
    assert f"{existing} exists; name another with --output" in message
    assert (tmp_path / existing).read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"sft.yaml", existing}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (change(HANDBOOK, chat_template="{% for %}"), "chat template, line 1"),
        (change(HANDBOOK, dataset_mixture={"datasets": [{"id": "a/b", "weight": -1}]}), "weight: found -1"),
        ("- a", "is a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_import_command_of_what_cannot_load_writes_nothing(sft, tmp_path: Path, text: str, message: str):
    (tmp_path / "sft.yaml").write_text(text)
    assert message in sft("import", tmp_path / "sft.yaml", "--output", tmp_path / "mine.yaml", code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sft.yaml"]


def test_import_command_of_a_missing_file_says_so(sft, tmp_path: Path):
    assert "none.yaml: no such recipe" in sft("import", tmp_path / "none.yaml", code=1).stderr
