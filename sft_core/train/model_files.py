"""The weight files of a start model, looked at before any work: whether they are whole, and their numbers finite."""

from __future__ import annotations

import json
import time
from pathlib import Path

from sft_core.local_files import is_local
from sft_core.recipe.wording import some

INDEX = "model.safetensors.index.json"
WITHIN_S = 10.0  # of reading weights; what is not read by then is checked when the model is loaded


def model_folder(path: str, revision: str | None) -> Path | None:
    """The folder of the files, or that of the hub's cache; None where they are not on this machine."""
    if is_local(path):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None


def check_files(folder: Path, *, is_cache: bool = False) -> None:
    """Raises ValueError for a torn safetensors file or config.json, and for what the index names in vain.

    Reads the headers alone. is_cache: files that are not there yet are fetched later.
    """
    from safetensors import SafetensorError, safe_open

    _check_config(folder / "config.json")
    names: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as opened:
                names[file.name] = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: no whole safetensors file ({error}); fetch it again") from None
    index = folder / INDEX
    if not index.is_file():
        return
    try:
        where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: no index of weights ({error}); fetch it again") from None
    if not is_cache and (missing := sorted({*where.values()} - names.keys())):
        raise ValueError(f"{index}: it names files that are not there: {some(missing)}; fetch the whole model")
    if absent := sorted(name for name, file in where.items() if name not in names.get(file, {name})):
        raise ValueError(f"{index}: it names tensors that its files do not have: {some(absent)}; fetch the whole model")


def _check_config(file: Path) -> None:
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: no JSON ({error}); fetch it again") from None
    if not isinstance(config, dict) or not {"model_type", "auto_map"} & config.keys():
        raise ValueError(f"{file}: names no model_type, so it is no model's config; fetch it again")


def check_finite(folder: Path, within_s: float = WITHIN_S) -> None:
    """Raises NotFiniteError for tensors with infinities or NaN, as far as the time allows to read them."""
    from safetensors import safe_open

    from sft_core.train.finite import check_weights

    end = time.monotonic() + within_s
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dict
                check_weights([(name, opened.get_tensor(name))], str(file))
                if time.monotonic() > end:
                    return
