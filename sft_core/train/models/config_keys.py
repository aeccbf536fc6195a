"""The keys of a model's config that its class knows: transformers keeps a misspelt key and computes without it."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from sft_core.recipe.wording import nearest

_TYPING_ERROR = 0.85  # of difflib's ratio: a key as near as this to a known one is probably meant to be it


def check_keys(config: Any, keys: Mapping[str, Any]) -> None:
    """Raises ValueError for keys of a recipe's model.config that the model's class does not know."""
    if unknown := unknown_keys(config, keys):
        hints = [f"model.config.{name}: no key of a {_kind(config)} model{hint}" for name, hint in unknown.items()]
        raise ValueError("\n".join(hints))


def misspelt_keys(config: Any, keys: Mapping[str, Any]) -> list[str]:
    """A warning for each key of a published config.json that looks like a known one; hubs have other keys as well."""
    config_class: Any = type(config)
    known = known_keys(config_class)
    return [
        f"config.json: {name} is no key of a {_kind(config)} model, which has {close[0]}"
        for name in unknown_keys(config, keys)
        if (close := difflib.get_close_matches(name, known, n=1, cutoff=_TYPING_ERROR))
    ]


def unknown_keys(config: Any, keys: Mapping[str, Any], known: frozenset[str] = frozenset()) -> dict[str, str]:
    """The keys that neither the config's class nor its model's code names, each with the end of a message about it.

    known: the keys of a config of which this one is a part.
    """
    config_class: Any = type(config)
    known |= known_keys(config_class)
    unknown: dict[str, str] = {}
    for name, value in keys.items():
        part = getattr(config, name, None) if name in type(config).sub_configs else None
        if isinstance(value, Mapping) and part is not None:
            unknown |= {f"{name}.{inner}": hint for inner, hint in unknown_keys(part, value, known).items()}
        elif name not in known and not name.startswith("_"):
            unknown[name] = nearest(name, known, otherwise="")
    return unknown


@functools.cache
def known_keys(config_class: Any) -> frozenset[str]:
    """Names that the config's class takes, has, or reads, and those that its model reads of a config."""
    classes = [cls for cls in config_class.__mro__ if cls.__module__.startswith("transformers")]
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    names |= {*config_class.attribute_map, *vars(config_class()), *config_class.sub_configs, "model_type"}
    for cls in classes:
        names |= {*_texts(_tree(cls.__module__))}
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    for cls in inspect.getmro(model) if isinstance(model, type) else ():
        if cls.__module__.startswith("transformers.models."):
            names |= {*_read_of_configs(_tree(cls.__module__))}
    return frozenset(name for name in names if not name.startswith("_"))


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[module]))


def _texts(tree: ast.Module) -> Iterator[str]:
    """Texts that may be names, as in kwargs.pop("rope_theta")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


def _read_of_configs(tree: ast.Module) -> Iterator[str]:
    """Names that are read as config.name, or by getattr(config, "name")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            yield node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1 and _is_config(node.args[0]):
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value


def _is_config(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.endswith("config")


def _kind(config: Any) -> str:
    return str(config.model_type)
