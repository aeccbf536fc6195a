"""Adapters of another recipe: LoRA and the quantization under it."""

from __future__ import annotations

from steps.importer.account import Imported, short, switch


def read_lora(imported: Imported) -> None:
    """Takes the keys of PEFT and of quantization; without `use_peft` none of them is carried."""
    keys = imported.unread
    given = "use_peft" in keys
    is_on = switch(keys.pop("use_peft", None))
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    names |= {"lora_target_modules": "target_modules"}
    names |= {key: key for key in ("use_dora", "use_rslora", "load_in_4bit")}
    if not is_on:
        for key in [key for key in keys if key.startswith("lora_") or key in names]:
            imported.not_carried[key] = "use_peft is not true"
            del keys[key]
    else:
        imported.put("training.lora", {})
        modules = keys.get("lora_target_modules")
        if isinstance(modules, list) and len(modules) == 1:
            keys["lora_target_modules"] = modules[0]
        for key in [key for key in names if key in keys]:
            imported.carry(key, f"training.lora.{names[key]}", keys.pop(key))
        lora = imported.data["training"]["lora"]
        if "lora_dropout" not in lora:
            imported.assume("training.lora.lora_dropout", 0.05, "TRL's default")
        if "target_modules" not in lora:
            explanation = "TRL leaves it to PEFT, which knows some architectures (often q_proj and v_proj)"
            imported.assume("training.lora.target_modules", "all-linear", explanation)
        for key in [key for key in keys if key.startswith("lora_")]:
            imported.not_carried[key] = "training.lora has no such key"
            del keys[key]
    _quantization(imported)
    if given:
        imported.changed["use_peft"] = ("training.lora", "given" if is_on else "left out")


def _quantization(imported: Imported) -> None:
    """Takes the keys of quantization. Ours is the QLoRA paper's: NF4 with double quantization, in bfloat16."""
    keys = imported.unread
    in_4bit = imported.get("training.lora.load_in_4bit") is True
    as_here = {"bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    if in_4bit and not switch(keys.get("use_bnb_nested_quant")):
        imported.assumed["training.lora.load_in_4bit"] = "the constants are quantized too, which TRL leaves off"
    settings = (*as_here, "bnb_4bit_quant_storage", "load_in_8bit")
    for key in [key for key in settings if key in keys]:
        value = keys.pop(key)
        if in_4bit and key in as_here and as_here[key] in (value, switch(value)):
            imported.changed[key] = ("training.lora.load_in_4bit", f"{short(as_here[key])}: always so")
        elif in_4bit:
            imported.not_carried[key] = "training.lora.load_in_4bit is NF4 with double quantization, in bfloat16"
        else:
            imported.not_carried[key] = "weights are quantized under training.lora.load_in_4bit alone"
