"""The fields of trl.SFTConfig with their types, read off its source: importing TRL takes seconds and a gigabyte."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, Literal

# A class of fields after its base.
_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)


class _Names(dict[str, Any]):
    """What annotations name. Any other name is a class that takes its values as strings, as enums do."""

    def __missing__(self, name: str) -> type:
        return str


@functools.cache
def sft_fields() -> dict[str, Any]:
    """{name: type} of each field; where a field is typed by an enum, str in its place."""
    known = _Names(bool=bool, str=str, int=int, float=float, dict=dict, list=list, Any=Any, Literal=Literal)
    fields = {}
    for package, file, name in _CLASSES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, f"{package} is installed"
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        (definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields[node.target.id] = eval(ast.unparse(node.annotation), {"__builtins__": {}}, known)
    return fields
