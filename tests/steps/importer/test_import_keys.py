"""`sft import` key by key: carried as it is, carried with a change that is told, or not carried and why."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_core.recipe.parse import parse_recipe, read_yaml
from sft_core.recipe.recipe import ROOT_KEYS
from steps.importer.recipe import import_recipe
from steps.importer.text import account_text, recipe_text
from tests.steps.importer.test_import import MINIMAL, change, imported


@pytest.mark.parametrize(
    ("keys", "ours", "value"),
    [
        ({"learning_rate": "2.0e-05"}, "training.learning_rate", 2e-5),
        ({"learning_rate": "1e-5"}, "training.learning_rate", 1e-5),
        ({"max_seq_length": 2048.0}, "packing.max_length", 2048),
        ({"max_length": "2048"}, "packing.max_length", 2048),
        ({"num_train_epochs": 2}, "training.num_train_epochs", 2),
        ({"seed": "3"}, "training.seed", 3),
        ({"bf16": "yes"}, "training.bf16", True),
        ({"use_liger_kernel": "off"}, "training.use_liger_kernel", False),
        ({"model_revision": "1.0"}, "model.model_revision", "1.0"),
        ({"lr_scheduler_kwargs": '{"num_cycles": 2}'}, "training.lr_scheduler_kwargs", {"num_cycles": 2}),
        ({"adam_epsilon": "1e-6"}, "training.extra.adam_epsilon", 1e-6),
        ({"torch_compile": "off"}, "training.extra.torch_compile", False),
        ({"report_to": "wandb"}, "runtime.report_to", ["wandb"]),
        ({"per_device_eval_batch_size": 4}, "runtime.eval_batch_size", 4),
        ({"chat_template_path": "mine.jinja"}, "chat_template.template", "mine.jinja"),
        ({"use_peft": True, "lora_target_modules": ["all-linear"]}, "training.lora.target_modules", "all-linear"),
        ({"use_peft": "yes", "lora_r": 4.0}, "training.lora.r", 4),
        ({"use_peft": True, "use_dora": True}, "training.lora.use_dora", True),
        ({"use_peft": True, "use_rslora": "true"}, "training.lora.use_rslora", True),
        ({"use_peft": True, "load_in_4bit": True}, "training.lora.load_in_4bit", True),
        ({"dtype": "float32"}, "model.dtype", "float32"),
    ],
)
def test_key_is_carried_and_read_as_trl_reads_it(keys: dict[str, Any], ours: str, value: Any):
    found = imported(change(MINIMAL, **keys))
    key = list(keys)[-1]
    assert found.get(ours) == value and type(found.get(ours)) is type(value)
    assert found.carried[key] == ours


@pytest.mark.parametrize(
    ("keys", "ours", "value", "told"),
    [
        ({"packing": True}, "packing.packing_strategy", "ffd", "packing is on"),
        ({"packing": "yes"}, "packing.packing_strategy", "ffd", "packing is on"),
        ({"packing": False}, "packing.packing_strategy", "none", "one row a pack"),
        ({"packing": True, "packing_strategy": "bfd"}, "packing.packing_strategy", "ffd", "first-fit decreasing"),
        (
            {"packing": True, "assistant_only_loss": True, "packing_strategy": "bfd_split"},
            *("packing.packing_strategy", "ffd", "over_long: split"),
        ),
        ({"assistant_only_loss": False}, "training.loss_scope", "all", "every token"),
        ({"completion_only_loss": True}, "training.loss_scope", "completion", "last assistant turn"),
        ({"assistant_only_loss": "yes"}, "training.loss_scope", "assistant", "every assistant turn"),
        ({"warmup_steps": 0.1}, "training.warmup_ratio", 0.1, "0.1 as a share"),
        ({"warmup_ratio": 0.5, "max_steps": 10, "warmup_steps": 1}, "training.warmup_ratio", 0.1, "1 as a share"),
        ({"test_split_size": 0.1}, "dataset_mixture.report_share", 0.1, "by prompt"),
        ({"report_to": []}, "runtime.report_to", None, "none"),
        ({"use_peft": False}, "training.lora", None, "left out"),
        (
            {"use_peft": True, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            *("training.lora.load_in_4bit", True, "'nf4': always so"),
        ),
        (
            {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": "yes"},
            *("training.lora.load_in_4bit", True, "True: always so"),
        ),
        ({"deepspeed": "recipes/zero3.json"}, "runtime.distributed", "zero3", "by the name of recipes/zero3.json"),
        ({"deepspeed": "ds_z2_offload_config.json"}, "runtime.distributed", "zero2", "by the name"),
        (
            {"deepspeed": {"zero_optimization": {"stage": "1"}}},
            *("runtime.distributed", "zero2", "which shares the gradients too"),
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}},
            *("runtime.distributed", "zero3", "it offloads, which is not carried"),
        ),
        ({"deepspeed": {"train_batch_size": 8}}, "runtime.distributed", "ddp", "ZeRO stage 0"),
        ({"fsdp": "full_shard auto_wrap"}, "runtime.distributed", "fsdp2", "fully_shard"),
        ({"fsdp": ["full_shard", "offload"]}, "runtime.distributed", "fsdp2", "it offloads"),
        ({"max_steps": "-1"}, "training.max_steps", None, "epochs decide"),
        ({"dataset_train_split": "train[:10%]"}, "dataset_mixture.datasets[0].weight", 0.1, "not the first"),
        ({"dataset_train_split": "train[:500]"}, "dataset_mixture.datasets[0].num_rows", 500, "not the first"),
        ({"dataset_name": "data/chats.jsonl"}, "dataset_mixture.datasets[0].path", "data/chats.jsonl", "by path"),
    ],
)
def test_key_is_carried_with_a_change_that_is_told(keys: dict[str, Any], ours: str, value: Any, told: str):
    found = imported(change(MINIMAL, **keys))
    key = list(keys)[-1]
    assert found.get(ours) == value
    assert told in found.changed[key][1]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dtype": "float16"}, "float32 or bfloat16"),
        ({"torch_dtype": "auto"}, "not looked up"),
        ({"attn_implementation": "kernels-community/flash-attn3"}, "model.attn_implementation: found"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "training.lr_scheduler_type: found"),
        ({"learning_rate": "fast"}, "found 'fast'; input should be a valid number"),
        ({"learning_rate": [1]}, "found [1]"),
        ({"max_steps": "many"}, "found 'many'"),
        ({"warmup_steps": 100}, "it needs max_steps"),
        ({"warmup_steps": "x"}, "a number of at least 0"),
        ({"warmup_steps": 5, "max_steps": 10, "warmup_ratio": 0.5}, "warmup_steps is given"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"gradient_accumulation_steps": 1.5}, "at least 1"),
        ({"packing_strategy": "bfd"}, "packing is off"),
        ({"packing": True, "packing_strategy": "best"}, "none of TRL's"),
        ({"max_length": 10, "max_seq_length": 20}, "max_length is given"),
        ({"assistant_only_loss": True, "completion_only_loss": True}, "assistant_only_loss decides"),
        ({"lora_r": 4}, "use_peft is not true"),
        ({"use_dora": True}, "use_peft is not true"),
        ({"load_in_4bit": True}, "use_peft is not true"),
        ({"use_peft": True, "lora_target_parameters": ["a"]}, "training.lora has no such key"),
        ({"use_peft": True, "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "is NF4"),
        ({"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": False}, "double quantization"),
        ({"use_peft": True, "load_in_8bit": True}, "under training.lora.load_in_4bit alone"),
        ({"activation_checkpointing": True, "gradient_checkpointing": False}, "activation_checkpointing is given"),
        ({"chat_template_path": "org/another"}, "a tokenizer, not a template file"),
        ({"report_to": "all"}, "name the trackers"),
        ({"run_name": "my run"}, "letters, digits"),
        ({"dataset_mixture": {"datasets": [{"id": "a/c"}]}, "datasets": [{"path": "a/b"}]}, "dataset_mixture is given"),
        ({"datasets": [{"path": "a/b"}], "dataset_config": "x"}, "datasets is given"),
        ({"test_split_size": 1000}, "a share of the prompts"),
        ({"fsdp": ""}, "it is off"),
        ({"fsdp_config": {"min_num_params": 1}}, "configs/accelerate"),
        ({"deepspeed": "fast.json"}, "set runtime.distributed"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "ZeRO's stages are 0 to 3"),
        ({"deepspeed": "zero3.json", "fsdp": "full_shard"}, "runtime.distributed is zero3 by another key"),
        ({"adam_beta1": "x"}, "found 'x'"),
        ({"label_smoothing_factor": 0.1}, "set by the recipe's own keys"),
        ({"learning_rte": 0.1}, "did you mean 'learning_rate'"),
        ({"neftune_noise_alpha": None}, "null"),
    ],
)
def test_key_is_not_carried_and_the_reason_told(keys: dict[str, Any], words: str):
    data = read_yaml(MINIMAL) | keys
    found = import_recipe(data, output=Path("mine.yaml"))
    assert parse_recipe(found.data)
    key = list(keys)[-1]
    assert words in found.not_carried[key]


def test_rows_that_trl_splits_are_split_where_turns_are_known_and_cut_where_not():
    split = {"packing": True, "packing_strategy": "wrapped"}
    assert imported(change(MINIMAL, **split, assistant_only_loss=True)).get("packing.over_long") == "split"
    found = imported(change(MINIMAL, **split))
    assert found.get("packing.over_long") == "truncate"
    assert found.changed["packing_strategy"][1] == "ffd: rows are cut, not split"


def test_warmup_steps_are_the_same_steps_again_whatever_their_number():
    for num_steps in range(1, 400, 7):
        for warmup in (1, num_steps // 3 or 1, num_steps):
            found = imported(change(MINIMAL, max_steps=num_steps, warmup_steps=warmup))
            assert math.ceil(found.get("training.warmup_ratio") * num_steps) == warmup


# Nothing is lost


def leaves(data: dict[str, Any]) -> set[str]:
    """Every key of a recipe, those of its mixture and data sets one by one."""
    keys = set(data) - {"dataset_mixture", "datasets"}
    chosen = "dataset_mixture" if data.get("dataset_mixture") is not None else "datasets"
    keys |= {key for key in ("dataset_mixture", "datasets") if key in data and key != chosen}
    mixture = data.get(chosen)
    if mixture is None:
        return keys | ({chosen} & set(data))
    place = "dataset_mixture.datasets" if chosen == "dataset_mixture" else "datasets"
    if chosen == "dataset_mixture":
        keys |= {f"dataset_mixture.{key}" for key in mixture if key != "datasets"}
        mixture = mixture["datasets"]
    return keys | {f"{place}[{index}].{key}" for index, dataset in enumerate(mixture) for key in dataset}


def trl_fields() -> list[str]:
    from trl import ModelConfig, ScriptArguments, SFTConfig

    return sorted(
        {field.name for config in (SFTConfig, ModelConfig, ScriptArguments) for field in dataclasses.fields(config)}
    )


OTHERS = ["torch_dtype", "chat_template", "max_seq_length", "warmup_ratio", "overwrite_output_dir", "env", "x", "beta"]
OTHERS += [
    "run_name",
    "test_split_size",
    "streaming",
    "tokenizer_name_or_path",
    "logging_dir",
    "preprocessing_num_workers",
]
values = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3000)
    | st.floats(allow_nan=True)
    | st.sampled_from(
        [0.1, "1e-5", "2.0e-05", "3", "yes", "no", "auto", "bfloat16", "cosine", "none", "all", "a/b", "ünï #: x"]
    )
    | st.lists(st.sampled_from(["q_proj", "wandb", 1]), max_size=2)
    | st.dictionaries(
        st.sampled_from(["min_lr_rate", "use_reentrant", "a: b"]), st.booleans() | st.floats(), max_size=2
    )
)
datasets = st.lists(
    st.fixed_dictionaries(
        {"id": st.sampled_from(["org/a", "org/b", "a.jsonl"])},
        optional={
            "config": st.sampled_from([None, "SFT", "default"]),
            "split": st.sampled_from(["train", "a_think", "train[:5%]"]),
            "columns": st.just(["messages"]),
            "revision": st.just("main"),
        },
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.slow
def test_import_of_any_keys_loses_none_in_silence():
    num_keys: dict[str, int] = {"carried": 0, "changed": 0, "not_carried": 0}

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from([*trl_fields(), *OTHERS]), max_size=12, unique=True))
        source = {key: data.draw(values, label=key) for key in keys} | {"model_name_or_path": "org/model"}
        mixture = {"datasets": data.draw(datasets), **data.draw(st.sampled_from([{}, {"seed": 3}, {"y": 1}]))}
        source |= data.draw(st.sampled_from([{"dataset_name": "org/a"}, {"dataset_mixture": mixture}]))
        if "dataset_train_split" in source:
            source["dataset_train_split"] = "train"
        try:
            found = import_recipe(source, output=Path("mine.yaml"), num_processes=data.draw(st.integers(1, 9)))
            parse_recipe(found.data)
        except ValueError as error:
            assert str(error)
            return
        told = [*found.carried, *found.changed, *found.not_carried]
        assert sorted(told) == sorted(leaves(source)), "each key once"
        for key, ours in found.carried.items():
            assert found.get(ours) is not None, key
            if key in source and not isinstance(source[key], (str, list)):
                assert found.get(ours) == source[key], key
        for ours, _ in found.changed.values():
            parse_recipe(found.data)
            assert ours.split(".")[0] in ROOT_KEYS
        assert all(found.not_carried.values()) and all(found.assumed.values())
        assert read_yaml(recipe_text(found, "x")) == found.data
        shown = account_text(found)
        assert all(key in shown or "[" in key for key in told)
        for name in num_keys:
            num_keys[name] += len(getattr(found, name))

    check()
    assert min(num_keys.values()) > 30, num_keys


ACCELERATE = {
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "cpu"},
    "mixed_precision": "bf16",
    "num_processes": 8,
}


@pytest.mark.parametrize(
    ("config", "strategy"),
    [
        (ACCELERATE, "zero3"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}, "zero2"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "a/stage3.json"}}, "zero3"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, "fsdp2"),
        ({"distributed_type": "MULTI_GPU"}, "ddp"),
        ({"distributed_type": "NO"}, "ddp"),
        ({"distributed_type": "MEGATRON_LM"}, None),
    ],
)
def test_accelerate_config_is_the_strategy_and_each_key_of_it_is_told(config: dict[str, Any], strategy: str | None):
    found = import_recipe(read_yaml(MINIMAL), output=Path("mine.yaml"), accelerate=config)
    assert found.get("runtime.distributed") == strategy
    if strategy is not None:
        assert parse_recipe(found.data).runtime.distributed == strategy
    told = {**found.carried, **found.changed, **found.not_carried}
    assert {f"accelerate config: {key}" for key in config} <= told.keys()


def test_accelerate_config_that_offloads_is_told():
    found = import_recipe(read_yaml(MINIMAL), output=Path("mine.yaml"), accelerate=ACCELERATE)
    assert "it offloads" in found.not_carried["accelerate config: deepspeed_config"]


@pytest.mark.parametrize(("given", "batch"), [([], 64), (["--num-processes", "2"], 16)])
def test_accelerate_config_s_ranks_count_for_the_batch_unless_given(given: list[str], batch: int, sft, tmp_path: Path):
    (tmp_path / "sft.yaml").write_text(MINIMAL)
    (tmp_path / "zero3.yaml").write_text(json.dumps(ACCELERATE))
    output = tmp_path / "mine.yaml"
    arguments = ["import", str(tmp_path / "sft.yaml"), "--output", str(output)]
    done = sft(*arguments, "--accelerate-config", tmp_path / "zero3.yaml", *given)
    recipe = parse_recipe(read_yaml(output.read_text()))
    assert (recipe.last_phase.training.global_batch_size, recipe.runtime.distributed) == (batch, "zero3")
    assert "accelerate config: distributed_type" in done.output
