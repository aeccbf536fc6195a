"""The data of an alignment-handbook or TRL recipe as a dataset_mixture of ours."""

from __future__ import annotations

import re
from typing import Any

from sft_core.local_files import is_local, looks_like_files
from sft_core.recipe.datasets.mixture import RESERVED
from sft_core.recipe.datasets.union import section_of
from steps.importer.account import Imported

_HANDBOOK = {"id": "id", "config": "config", "split": "split", "columns": "columns", "weight": "weight"}
_TRL = {"path": "id", "name": "config", "split": "split", "columns": "columns"}
_SINGLE = {"dataset_name": "id", "dataset_config": "config", "dataset_train_split": "split"}
_FILE_BUILDERS = ("json", "parquet")
_SLICE = re.compile(r"(?P<split>[^\[+]+)\[:(?P<number>\d+)(?P<percent>%?)\]")
_LEFT_OUT = {
    "fraction": "a share of the rows that TRL keeps, in proportion to the other datasets'; weight is one of a dataset",
    "data_dir": "name the files with path, or the config that holds them",
    "data_files": "name the files with path, or the split that holds them",
}


def read_datasets(imported: Imported) -> None:
    """Takes the first of dataset_mixture (the handbook's), datasets (TRL's) and dataset_name that the input has.

    Raises ValueError where it names no data that a recipe of ours can name.
    """
    keys = imported.unread
    mixture, several = keys.pop("dataset_mixture", None), keys.pop("datasets", None)
    single = {key: keys.pop(key) for key in _SINGLE if key in keys}
    imported.put("dataset_mixture", {})
    if mixture is not None:
        if not isinstance(mixture, dict) or not isinstance(mixture.get("datasets"), list):
            raise ValueError("dataset_mixture.datasets: missing; it is the list of datasets")
        _mixture_settings(imported, {key: value for key, value in mixture.items() if key != "datasets"})
        _list(imported, mixture["datasets"], "dataset_mixture.datasets", _HANDBOOK)
        if several is not None:
            imported.not_carried["datasets"] = "dataset_mixture is given"
    elif several:
        if not isinstance(several, list):
            raise ValueError("datasets: it is a list of datasets")
        _list(imported, several, "datasets", _TRL)
    elif "dataset_name" in single:
        _list(imported, [single], "", _SINGLE)
        single = {}
    else:
        raise ValueError("dataset_mixture, datasets or dataset_name: missing; an import needs the data's names")
    for key in single:
        imported.not_carried[key] = f"{'dataset_mixture' if mixture is not None else 'datasets'} is given"
    if (size := keys.pop("test_split_size", None)) is not None:
        _test_split(imported, "test_split_size", size)
    if "report_share" not in imported.data["dataset_mixture"]:
        explanation = "this share of the prompts is held out for the scores"
        imported.assume("dataset_mixture.report_share", 0.05, explanation)
    _name_apart(imported)


def _mixture_settings(imported: Imported, settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        where = f"dataset_mixture.{key}"
        if value is None:
            imported.not_carried[where] = "null: nothing is set"
        elif key == "seed" and isinstance(value, int) and not isinstance(value, bool):
            imported.put(where, value)
            imported.carried[where] = where
        elif key == "test_split_size":
            _test_split(imported, where, value)
        else:
            imported.not_carried[where] = "no key of a mixture here"


def _test_split(imported: Imported, key: str, size: Any) -> None:
    if isinstance(size, float) and 0 < size < 0.98:  # beside the selection share
        explanation = "held out by prompt, of every source, for the scores"
        imported.change(key, "dataset_mixture.report_share", size, explanation)
    else:
        imported.not_carried[key] = f"found {size!r}; dataset_mixture.report_share is a share of the prompts"


def _list(imported: Imported, datasets: list[Any], where: str, names: dict[str, str]) -> None:
    if not datasets:
        raise ValueError(f"{where}: found []; it needs at least one dataset")
    imported.put("dataset_mixture.datasets", [])
    for index, dataset in enumerate(datasets):
        if not isinstance(dataset, dict):
            raise ValueError(f"{where}[{index}]: found {dataset!r}; it is a mapping")
        place = f"{where}[{index}]." if where else ""
        _dataset(imported, dict(dataset), place, f"dataset_mixture.datasets[{index}]", names)


def _dataset(imported: Imported, keys: dict[str, Any], place: str, ours: str, names: dict[str, str]) -> None:
    dataset: dict[str, Any] = {}
    imported.data["dataset_mixture"]["datasets"].append(dataset)
    for key in [key for key, value in keys.items() if value is None]:
        imported.not_carried[place + key] = "null: nothing is set"
        del keys[key]
    key_of = {our_key: key for key, our_key in names.items()}
    key = key_of["id"]
    origin = keys.get(key)
    if not isinstance(origin, str):
        raise ValueError(f"{place}{key}: found {origin!r}; it is a hub id or a file")
    if origin in _FILE_BUILDERS and "data_files" in keys:
        dataset["path"] = _files(keys.pop("data_files"), str(keys.get("split", "train")), place)
        imported.changed[place + key] = (f"{ours}.path", "files are read by what they are")
        imported.changed[f"{place}data_files"] = (f"{ours}.path", "files are named by path")
        if keys.pop("split", None) is not None:
            imported.changed[f"{place}split"] = (f"{ours}.path", "the files of that split")
        del keys[key]
    elif is_local(origin) or (looks_like_files(origin) and "/" in origin):
        dataset["path"] = keys.pop(key)
        imported.changed[place + key] = (
            f"{ours}.path",
            "files are named by path; a folder needs a glob (folder/*.parquet)",
        )
    for key in [key for key in names if key in keys]:
        _field(imported, dataset, place + key, f"{ours}.{names[key]}", keys.pop(key))
    for key in keys:
        imported.not_carried[place + key] = _LEFT_OUT.get(key, "no key of a dataset there, or none here")


def _field(imported: Imported, dataset: dict[str, Any], key: str, ours: str, value: Any) -> None:
    field = ours.rpartition(".")[2]
    if field == "split" and isinstance(value, str) and re.search(r"[\[+]", value):
        sliced = _SLICE.fullmatch(value)
        if not sliced or "weight" in dataset:
            raise ValueError(f"{key}: found {value!r}; write a dataset for each split, its share as weight or num_rows")
        dataset["split"] = sliced["split"]
        number = int(sliced["number"])
        amount = {"weight": number / 100} if sliced["percent"] else {"num_rows": number}
        dataset |= amount
        imported.changed[key] = (ours, f"{sliced['split']}, and {next(iter(amount))}: as many rows, not the first ones")
        return
    if "path" in dataset and field in ("config", "split"):
        imported.not_carried[key] = "files have none"
        return
    dataset[field] = value
    imported.carried[key] = ours


def _files(files: Any, split: str, place: str) -> Any:
    chosen = files.get(split) if isinstance(files, dict) else files
    if not isinstance(chosen, (str, list)) or not chosen:
        raise ValueError(f"{place}data_files: found {files!r}; it names files, by split where it is a mapping")
    return chosen


def _name_apart(imported: Imported) -> None:
    """Gives datasets that would share a name (ours take their split's) names of their own."""
    datasets = imported.data["dataset_mixture"]["datasets"]
    sources = [_source_of(dataset) for dataset in datasets]
    taken = set(RESERVED) | {source for source in sources if sources.count(source) == 1}
    for index, (dataset, source) in enumerate(zip(datasets, sources, strict=True)):
        if sources.count(source) == 1 and source not in RESERVED:
            continue
        config = dataset.get("config") if dataset.get("config") != "default" else None
        parts = [str(dataset.get("id") or source).split("/")[-1], config, dataset.get("split")]
        name = base = re.sub(r"[^A-Za-z0-9._-]", "_", "_".join(str(part) for part in parts if part))
        for number in range(2, len(datasets) + 2):
            if name not in taken:
                break
            name = f"{base}_{number}"
        taken.add(name)
        dataset["name"] = name
        imported.assumed[f"dataset_mixture.datasets[{index}].name"] = "another dataset has the same split's name"


def _source_of(dataset: dict[str, Any]) -> str:
    """The name of a dataset whose values are not validated yet."""
    section = section_of(dataset)
    assert section is not None, "an imported dataset has an id or a path"
    return section.model_construct(**dataset).source
