"""`sft import`: an alignment-handbook or TRL recipe as one of ours, and an account of every key of it.

Invariant: each key of the input is carried as it is, carried with a stated change, or listed as not carried.
Where the input relies on a default of TRL (1.16) that differs from ours, our recipe states TRL's value.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from sft_core.recipe.parse import parse_recipe, read_yaml
from sft_core.train.arguments import check_extra
from steps.importer.account import Imported, number, readings, short, switch
from steps.importer.datasets import read_datasets
from steps.importer.lora import read_lora
from steps.importer.strategy import SETTINGS, read_strategy
from steps.importer.text import recipe_text

# TRL's key: our key with the same meaning.
_SAME = {
    "model_name_or_path": "model.model_name_or_path",
    "model_revision": "model.model_revision",
    "tokenizer_name_or_path": "model.tokenizer_name_or_path",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "eos_token": "model.eos_token",
    "chat_template_path": "chat_template.template",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.lr_scheduler_type",
    "lr_scheduler_kwargs": "training.lr_scheduler_kwargs",
    "num_train_epochs": "training.num_train_epochs",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "bf16": "training.bf16",
    "activation_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "use_liger_kernel": "training.use_liger_kernel",
    "seed": "training.seed",
    "logging_steps": "runtime.logging_steps",
    "save_steps": "runtime.save_steps",
    "per_device_eval_batch_size": "runtime.eval_batch_size",
}
# TRL's defaults that differ from ours.
_TRL_DEFAULTS = {
    "training.lr_scheduler_type": "linear",
    "training.num_train_epochs": 3.0,
    "training.bf16": True,
    "training.gradient_checkpointing": True,
}
_PUSH = "set hub.model_id to push; the repository is private by default"
_EVALUATION = "base and tuned model are scored after training, on held-out prompts (evaluation)"
_SAVING = "checkpoints are by steps (runtime.save_steps), the newest ones kept"
_LOGGING = "logs are by steps (runtime.logging_steps)"
_AHEAD = "data is prepared ahead of training, and ranks do not wait for it"
_STORE = "outputs have addresses of their own in runtime.store"
_NOT_CARRIED = {
    "hub_token": "a recipe is stored with what it makes; set HF_TOKEN in the environment",
    "push_to_hub_token": "a recipe is stored with what it makes; set HF_TOKEN in the environment",
    "env": "environment variables are set where a run starts, and may be secrets",
    "push_to_hub": _PUSH,
    "do_train": "a run trains",
    **dict.fromkeys(("do_eval", "do_predict", "dataset_test_split", "prediction_loss_only"), _EVALUATION),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _EVALUATION),
    **dict.fromkeys(("save_strategy", "save_total_limit", "save_only_model"), _SAVING),
    **dict.fromkeys(("logging_strategy", "logging_first_step", "log_level", "disable_tqdm"), _LOGGING),
    **dict.fromkeys(("dataset_num_proc", "dataset_kwargs", "ddp_timeout", "preprocessing_num_workers"), _AHEAD),
    **dict.fromkeys(("dataset_streaming", "streaming"), "sources are always read as a stream"),
    "dataset_text_field": "rows are read by their columns' names (dataset_mixture.datasets[].format)",
    "remove_unused_columns": "only the conversation reaches training",
    "shuffle_dataset": "packs are shuffled anew in each epoch",
    **dict.fromkeys(("output_dir", "overwrite_output_dir", "logging_dir"), _STORE),
    "resume_from_checkpoint": "an interrupted training goes on by itself",
    "average_tokens_across_devices": "always so: the mean over all trained tokens of the global batch",
    "padding_free": "always so: packs hold no padding",
    **dict.fromkeys(("fsdp_config", "parallelism_config", "accelerator_config"), SETTINGS),
    "fp16": "training.bf16 is the only mixed precision",
}
_NEWER = {"gradient_checkpointing_kwargs": "activation_checkpointing_kwargs"}  # in transformers
_NOT_CARRIED_PREFIXES = {"hub_": _PUSH, "eval_": _EVALUATION}


def import_recipe(
    source: dict[str, Any], *, output: Path, num_processes: int = 1, accelerate: dict[str, Any] | None = None
) -> Imported:
    """Our recipe and the account of every key.

    source: the other recipe's plain data. accelerate: that of the accelerate config it was launched with. Raises
    ValueError for a model or data that a recipe of ours cannot name.
    """
    name = "".join(c if (c.isascii() and c.isalnum()) or c in "._-" else "-" for c in output.stem)
    imported = Imported({"name": name, "model": {}}, dict(source))
    for key in [key for key, value in source.items() if value is None]:
        imported.not_carried[key] = "null: nothing is set"
        del imported.unread[key]
    _model(imported, output)
    read_datasets(imported)
    _packing(imported)
    _loss_scope(imported)
    _batch(imported, num_processes)
    _schedule(imported)
    read_lora(imported)
    _runtime(imported)
    read_strategy(imported, accelerate or {})
    _simple(imported)
    _rest(imported)
    for ours, value in _TRL_DEFAULTS.items():
        section, key = ours.split(".")
        if key not in imported.data.get(section, {}):
            imported.assume(ours, value, "TRL's default")
    return imported


def _model(imported: Imported, output: Path) -> None:
    keys = imported.unread
    if not isinstance(keys.get("model_name_or_path"), str):
        raise ValueError("model_name_or_path: missing; sft import needs an SFT recipe of the alignment-handbook or TRL")
    for key in [key for key in ("dtype", "torch_dtype") if key in keys]:
        dtype = keys.pop(key)
        if dtype in ("float32", "bfloat16"):
            imported.put("model.dtype", dtype)
            imported.carried[key] = "model.dtype"
        else:
            imported.not_carried[key] = (
                f"{dtype!r}: model.dtype is float32 or bfloat16, and not looked up in the weights"
            )
    if isinstance(template := keys.pop("chat_template", None), str):
        imported.template = template
        path = str(output.with_suffix(".jinja"))
        imported.change("chat_template", "chat_template.template", path, "the text is in a file of its own")
        if "strftime_now" in template:
            imported.assumed["chat_template.date"] = "2026-01-01 is what the template sees as today; set another"
        if "chat_template_path" in keys:
            del keys["chat_template_path"]
            imported.not_carried["chat_template_path"] = "chat_template is given"
    elif template is not None:
        imported.not_carried["chat_template"] = "it is no text"
    file = keys.get("chat_template_path")
    if file is not None and not str(file).endswith((".jinja", ".j2", ".txt")):
        del keys["chat_template_path"]
        imported.not_carried["chat_template_path"] = (
            "a tokenizer, not a template file; leave chat_template.template out for the model's own"
        )


def _packing(imported: Imported) -> None:
    keys = imported.unread
    given = keys.pop("packing", None)
    is_on = switch(given)
    imported.put("packing.packing_strategy", "ffd" if is_on else "none")
    if given is None:
        imported.assume("packing.packing_strategy", "none", "TRL's default; one row a pack")
    else:
        imported.changed["packing"] = ("packing.packing_strategy", "packing is on" if is_on else "one row a pack")
    over_long, explanation = "truncate", "TRL cuts at a token, this after the last turn that fits"
    strategy = keys.pop("packing_strategy", None)
    if strategy is not None and not is_on:
        imported.not_carried["packing_strategy"] = "packing is off"
    elif strategy == "ffd":
        imported.carried["packing_strategy"] = "packing.packing_strategy"
    elif strategy == "bfd":
        packer = "ffd: first-fit decreasing over the whole mixture, for best-fit over 1000 rows at a time"
        imported.changed["packing_strategy"] = ("packing.packing_strategy", packer)
    elif strategy in ("bfd_split", "wrapped"):
        over_long, explanation = "split", f"TRL's {strategy} cuts at a token, this at turns"
        imported.changed["packing_strategy"] = ("packing.packing_strategy", "ffd, and over_long: split")
    elif strategy is not None:
        imported.not_carried["packing_strategy"] = f"found {strategy!r}; it is none of TRL's"
    imported.assume("packing.over_long", over_long, explanation)
    lengths = {key: keys.pop(key) for key in ("max_length", "max_seq_length") if key in keys}
    for key, value in lengths.items():
        if "max_length" in imported.data["packing"]:
            imported.not_carried[key] = "max_length is given"
        else:
            imported.carry(key, "packing.max_length", value)
    if "max_length" not in imported.data["packing"]:
        imported.assume("packing.max_length", 1024, "TRL's default; a pack has a length here")


def _loss_scope(imported: Imported) -> None:
    keys = imported.unread
    scopes = {"assistant_only_loss": "assistant", "completion_only_loss": "completion"}
    given = {key: keys.pop(key) for key in scopes if key in keys}
    chosen = next((key for key, value in given.items() if switch(value)), None)
    scope = scopes[chosen] if chosen else "all"
    imported.put("training.loss_scope", scope)
    explanations = {
        "assistant": "assistant: every assistant turn",
        "completion": "completion: the last assistant turn",
        "all": "all: every token",
    }
    for key in given:
        if chosen in (None, key):
            imported.changed[key] = ("training.loss_scope", explanations[scope])
        else:
            imported.not_carried[key] = f"{chosen} decides"
    if not given:
        imported.assumed["training.loss_scope"] = (
            "TRL trains on every token of a conversation; where the rows are prompt and completion, write completion"
        )
    if scope == "all" and imported.data["packing"]["over_long"] == "split":
        imported.assume("packing.over_long", "truncate", "split needs turns to cut at, and loss_scope all knows none")
        imported.changed["packing_strategy"] = ("packing.packing_strategy", "ffd: rows are cut, not split")


def _batch(imported: Imported, num_processes: int) -> None:
    keys = imported.unread
    counts = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # TRL's defaults
    given = []
    for key in [key for key in counts if key in keys]:
        value = keys.pop(key)
        count = number(value)
        if count is None or count < 1 or count != int(count):
            imported.not_carried[key] = f"found {short(value)}; it is a whole number of at least 1"
        else:
            counts[key] = int(count)
            given.append(key)
    rows, accumulated = counts.values()
    explanation = f"{rows} a device x {accumulated} accumulated x {num_processes} processes (--num-processes)"
    imported.put("training.global_batch_size", rows * accumulated * num_processes)
    for key in given:
        imported.changed[key] = ("training.global_batch_size", explanation)
    if not given:
        imported.assume("training.global_batch_size", rows * accumulated * num_processes, explanation)


def _schedule(imported: Imported) -> None:
    keys = imported.unread
    if (max_steps := keys.pop("max_steps", None)) is not None:
        count = number(max_steps)
        if count is not None and count <= 0:
            imported.changed["max_steps"] = ("training.max_steps", "not set: epochs decide")
        else:
            imported.carry("max_steps", "training.max_steps", max_steps)
    if (warmup := keys.pop("warmup_steps", None)) is not None:
        ratio, refused = _warmup(number(warmup), imported.data["training"].get("max_steps"))
        if ratio is None:
            imported.not_carried["warmup_steps"] = f"found {short(warmup)}; {refused}"
        elif ratio == 0 and "warmup_ratio" in keys:
            imported.not_carried["warmup_steps"] = "warmup_ratio is given"
        else:
            if keys.pop("warmup_ratio", None) is not None:
                imported.not_carried["warmup_ratio"] = "warmup_steps is given, and wins in TRL"
            imported.change("warmup_steps", "training.warmup_ratio", ratio, f"{short(warmup)} as a share of the steps")
    if "warmup_ratio" in keys:
        imported.carry("warmup_ratio", "training.warmup_ratio", keys.pop("warmup_ratio"))
    if "warmup_ratio" not in imported.data["training"]:
        imported.assume("training.warmup_ratio", 0.0, "TRL's default")


def _warmup(steps: float | None, num_steps: int | None) -> tuple[float | None, str]:
    """(share of the steps, ""), or (None, why). transformers reads a value under 1 as a share, so it stays one."""
    if steps is None or steps < 0:
        return None, "it is a number of at least 0"
    if steps < 1:
        return float(steps), ""
    if num_steps is None:
        return None, "as a share of the steps it needs max_steps; set training.warmup_ratio"
    return _ratio(steps, num_steps), ""


def _ratio(warmup_steps: float, num_steps: int) -> float:
    """The share from which training computes these steps again. It rounds up: an error upwards would add a step."""
    ratio = min(1.0, warmup_steps / num_steps)
    while math.ceil(ratio * num_steps) > warmup_steps:
        ratio = math.nextafter(ratio, 0.0)
    return ratio


def _runtime(imported: Imported) -> None:
    keys = imported.unread
    report_to = keys.pop("report_to", None)
    trackers = [report_to] if isinstance(report_to, str) else report_to
    if trackers in (["none"], []):
        imported.changed["report_to"] = ("runtime.report_to", "none")
    elif trackers == ["all"]:
        imported.not_carried["report_to"] = "name the trackers in runtime.report_to"
    elif trackers is not None:
        imported.carry("report_to", "runtime.report_to", trackers)
    if (name := keys.pop("run_name", None)) is not None:
        if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9._-]+", name):
            imported.put("name", name)
            imported.carried["run_name"] = "name"
        else:
            imported.not_carried["run_name"] = "a recipe's name holds letters, digits and ._- only"


def _simple(imported: Imported) -> None:
    keys = imported.unread
    given: dict[str, str] = {}
    for key, ours in _SAME.items():
        if key in keys and ours in given:
            imported.not_carried[key] = f"{given[ours]} is given"
            del keys[key]
        elif key in keys and imported.carry(key, ours, keys.pop(key)):
            given[ours] = key


def _rest(imported: Imported) -> None:
    """Takes all other keys: some have a known reason not to be carried, SFTConfig's fields go to training.extra."""
    keys = imported.unread
    for key, value in keys.items():
        refused = ""
        prefix = next((why for start, why in _NOT_CARRIED_PREFIXES.items() if key.startswith(start)), None)
        if why := _NOT_CARRIED.get(key, prefix):
            imported.not_carried[key] = why
            continue
        name = _NEWER.get(key, key)
        if name != key and name in keys:
            imported.not_carried[key] = f"{name} is given"
            continue
        for reading in readings(value):
            try:
                json.dumps(reading, allow_nan=False)
                check_extra({name: reading})
            except ValueError as error:
                refused = refused or str(error).removeprefix(f"training.extra.{name}: ")
                continue
            imported.put(f"training.extra.{name}", reading)
            imported.carried[key] = f"training.extra.{name}"
            break
        else:
            imported.not_carried[key] = refused
    keys.clear()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe (looked in {Path.cwd()})")
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a recipe is UTF-8 text; byte {error.start} is not") from None


def write_imported(path: Path, output: Path, num_processes: int | None, accelerate: Path | None = None) -> Imported:
    """Reads the other recipe and writes ours, and an inline chat template into a file beside it.

    num_processes: None takes accelerate's, or 1. Raises ValueError for a recipe that cannot be one of ours, and
    FileExistsError rather than replace a file.
    """
    from sft_core.data.rendering.templates import compile_template

    source, launched = _read(path), _read(accelerate) if accelerate else {}
    template = output.with_suffix(".jinja")
    for file in [output, *([template] if source.get("chat_template") else [])]:
        if file.exists():
            raise FileExistsError(f"{file} exists; name another with --output")
    ranks = num_processes or max(1, int(number(launched.get("num_processes")) or 1))
    imported = import_recipe(source, output=output, num_processes=ranks, accelerate=launched)
    # Parse before writing: a faulty file would block the next import, which replaces no file.
    parse_recipe(imported.data)
    text = recipe_text(imported, f"From {path.name} by `sft import`. `sft plan {output}` says what a run will do.")
    assert read_yaml(text) == imported.data, "the text holds the imported data"
    if imported.template is not None:
        compile_template(imported.template)
        template.write_text(imported.template, encoding="utf-8")
    output.write_text(text, encoding="utf-8")
    return imported
