"""Pins: the commits and file digests to which the recipe's names point now. A run resolves them once.

All later steps use the pinned recipe, so that a run and its resume see the same models and data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from sft_core.data.sources.hub_token import check_token
from sft_core.data.sources.registry import source_of
from sft_core.local_files import digest_files, is_local
from sft_core.pins.lm_eval_tasks import LmEvalPins, digest_task, pin_tasks
from sft_core.recipe.datasets.dataset import Dataset
from sft_core.recipe.recipe import Phase, Recipe
from sft_core.rounds import Rounds
from sft_core.store.stage import Json, Part, Unresolved

TEMPLATES = Path(__file__).resolve().parents[2] / "configs" / "templates"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "spiece")


class Pins(TypedDict):
    """Commits of names on the hub, and digests of local files. None: there is no such name, or it is not resolved."""

    sources: dict[str, str | None]
    tokenizer: str | None
    model: str | None
    template: str | None
    lm_eval: NotRequired[LmEvalPins]
    licences: NotRequired[dict[str, str]]  # by `kind id`


@dataclasses.dataclass(frozen=True)
class PinnedRecipe:
    """A recipe with its pins, which are small plain data; identities hold them in place of names."""

    recipe: Recipe
    pins: Pins
    unresolved: tuple[str, ...] = ()  # a line for each reason why a pin is None
    rounds: Mapping[str, Rounds] = dataclasses.field(default_factory=dict)  # of each phase with a search

    def phase_name(self, part: Part) -> str:
        """The phase of an output. With several phases, its part names the phase, or a source or task of the phase."""
        names = [*self.recipe.phases]
        if len(names) == 1:
            return names[0]
        return part["phase"] if "phase" in part else self.recipe.phase_of(part.get("source") or part["task"])

    def phase(self, part: Part) -> Phase:
        return self.recipe.phases[self.phase_name(part)]

    def part_of(self, phase: str, **rest: Any) -> Part:
        """The part of an output of the phase. It names the phase only in a recipe with several."""
        return rest if len(self.recipe.phases) == 1 else {"phase": phase, **rest}

    def phase_before(self, phase: str) -> str | None:
        """The phase from whose checkpoint this one starts; None: from the start model."""
        names = [*self.recipe.phases]
        return names[names.index(phase) - 1] if phase != names[0] else None

    def source_pin(self, source: str) -> str:
        """Raises Unresolved."""
        return _known(self.pins["sources"][source], source)

    # Each model, tokenizer or task has an identity (digests, goes into keys) and a loader (paths, does not). A builder
    # may ask for a loader long after the run began, so the loader compares local files with their pins.

    @property
    def tokenizer_identity(self) -> dict[str, Json]:
        model = self.recipe.model
        tokens = {"add_special_tokens": list(model.add_special_tokens), "eos_token": model.eos_token}
        return {"pin": _known(self.pins["tokenizer"], model.tokenizer), **tokens}

    @property
    def tokenizer_loader(self) -> dict[str, Any]:
        model = self.recipe.model
        if is_local(model.tokenizer):
            _unchanged("model.tokenizer_name_or_path", self.pins["tokenizer"], _digest_tokenizer(self.recipe))
        return {
            "path": os.path.expanduser(model.tokenizer),
            "revision": None if is_local(model.tokenizer) else self.pins["tokenizer"],
            "add_special_tokens": list(model.add_special_tokens),
            "eos_token": model.eos_token,
            "trust_remote_code": model.trust_remote_code,
        }

    @property
    def model_identity(self) -> dict[str, Json]:
        model = self.recipe.model
        return {
            "pin": None if model.config is not None else _known(self.pins["model"], str(model.model_name_or_path)),
            "config": model.config,
            "dtype": model.dtype,
            "attn_implementation": model.attn_implementation,
            "stop_tokens": list(model.stop_tokens),
        }

    @property
    def model_loader(self) -> dict[str, Any]:
        model = self.recipe.model
        name = model.model_name_or_path
        if name is not None and is_local(name):
            _unchanged("model.model_name_or_path", self.pins["model"], _digest_model(self.recipe))
        return {
            "path": None if name is None else os.path.expanduser(name),
            "revision": None if name is None or is_local(name) else self.pins["model"],
            "config": model.config,
            "dtype": model.dtype,
            "attn_implementation": model.attn_implementation,
            "stop_tokens": list(model.stop_tokens),
            "trust_remote_code": model.trust_remote_code,
        }

    @property
    def template_identity(self) -> dict[str, Json]:
        template = self.recipe.chat_template
        return {"pin": self.pins["template"], "kwargs": template.kwargs, "date": template.date.isoformat()}

    def harness_identity(self, task: str) -> dict[str, Json]:
        """The version and the digest on which an lm-eval task's prompts and scores depend."""
        pinned = self.pins["lm_eval"]
        return {"name": task, "lm_eval": pinned["version"], "digest": pinned["tasks"][task]["digest"]}

    def harness_loader(self, task: str) -> dict[str, Json]:
        lm_eval, pinned = self.recipe.evaluation.lm_eval, self.pins["lm_eval"]["tasks"][task]
        assert lm_eval is not None, "a plan has lm-eval tasks only for a recipe with evaluation.lm_eval"
        digest = digest_task(task, lm_eval.include_path, pinned["folders"])
        _unchanged(f"evaluation.lm_eval.tasks: {task}", pinned["digest"], digest)
        return {"name": task, "include_path": lm_eval.include_path, "folders": pinned["folders"]}

    def row_policy(self, part: Part) -> dict[str, str]:
        template = self.recipe.chat_template
        choices = {name: getattr(template, name) for name in ("thinking", "empty_thinking", "served_prefix")}
        return {"loss_scope": self.phase(part).training.loss_scope, **choices}

    @property
    def template_text(self) -> str | None:
        path = template_path(self.recipe)
        if path is None:
            return None
        _unchanged("chat_template.template", self.pins["template"], hashlib.sha256(path.read_bytes()).hexdigest())
        return path.read_text(encoding="utf-8")

    @property
    def template_arguments(self) -> dict[str, Json]:
        template = self.recipe.chat_template
        return {"source": self.template_text, "kwargs": template.kwargs, "date": template.date.isoformat()}


def _known(pin: str | None, name: str) -> str:
    if pin is None:
        raise Unresolved(f"{name}: not resolved to a commit")
    return pin


def pin(recipe: Recipe, *, allow_unresolved: bool = False) -> PinnedRecipe:
    """Resolves every name. Raises FileNotFoundError for a missing file and Unresolved for an unknown hub name.

    allow_unresolved: a name that cannot be resolved has the pin None, for planning without a network.
    """
    hub = _Hub(allow_unresolved)
    sources = {dataset.source: _pin_source(dataset, hub) for dataset in recipe.datasets}
    model, name = recipe.model, recipe.model.model_name_or_path
    pins: Pins = {"sources": sources, "tokenizer": None, "model": None, "template": None}
    if name is not None:
        pins["model"] = _digest_model(recipe) if is_local(name) else hub.resolve("model", name, model.model_revision)
    pins["tokenizer"] = (
        _digest_tokenizer(recipe)
        if is_local(model.tokenizer)
        else pins["model"]
        if model.tokenizer == name
        else hub.resolve("model", model.tokenizer, "main")
    )
    if (template := template_path(recipe)) is not None:
        pins["template"] = hashlib.sha256(template.read_bytes()).hexdigest()
    if lm_eval := recipe.evaluation.lm_eval:
        pins["lm_eval"] = pin_tasks(lm_eval.tasks, lm_eval.include_path, lm_eval.num_fewshot)
    if hub.licences:
        pins["licences"] = hub.licences
    return PinnedRecipe(recipe, pins, hub.problems)


def _pin_source(dataset: Dataset, hub: _Hub) -> str | None:
    try:
        return source_of(dataset).pin(hub)
    except Unresolved as error:
        hub.refuse(error)
        return None


class HubUnreachable(Unresolved):
    """The hub did not answer, so asking it for the next name would only cost time."""


class _Hub:
    """Resolves each name once, since the sources of a mixture are often splits of one dataset."""

    def __init__(self, allow_unresolved: bool):
        self._allow_unresolved = allow_unresolved
        self._known: dict[tuple[str, str, str], str | None] = {}
        self.licences: dict[str, str] = {}  # by `kind id`; only of names for which the hub states one
        self._refused: list[str] = []
        self._unasked: list[str] = []
        self._unreachable = ""

    def resolve(self, kind: str, id: str, revision: str) -> str | None:
        """The commit; None where it cannot be resolved and None is allowed. Raises Unresolved otherwise."""
        name = (kind, id, revision)
        if name not in self._known:
            self._known[name] = self._ask(*name)
        return self._known[name]

    def refuse(self, error: Unresolved) -> None:
        """Records a problem, which a plan shows. Raises the problem where None is not allowed."""
        if not self._allow_unresolved:
            raise error
        self._refused.append(str(error))

    @property
    def problems(self) -> tuple[str, ...]:
        unasked = [f"{', '.join(self._unasked)}: {self._unreachable}"] if self._unasked else []
        return (*self._refused, *unasked)

    def _ask(self, kind: str, id: str, revision: str) -> str | None:
        if not self._allow_unresolved:
            return self._noted(kind, id, resolve(kind, id, revision))
        if self._unreachable and not _COMMIT.fullmatch(revision):
            self._unasked.append(f"{kind} {id} at {revision}")
            return None
        try:
            # A short timeout: a person waits for the plan, and a plan needs no commit.
            return self._noted(kind, id, resolve(kind, id, revision, timeout_s=3))
        except HubUnreachable as error:
            self._unasked.append(f"{kind} {id} at {revision}")
            self._unreachable = str(error).partition(": ")[2]
        except Unresolved as error:
            self.refuse(error)
        return None

    def _noted(self, kind: str, id: str, resolved: Resolved) -> str:
        if resolved.licence is not None:
            self.licences[f"{kind} {id}"] = resolved.licence
        return resolved.commit


class Resolved(NamedTuple):
    commit: str
    licence: str | None  # from the card on the hub; None for a card without one, or where the hub was not asked


def resolve(kind: str, id: str, revision: str, *, timeout_s: float = 10) -> Resolved:
    """The 40-digit commit of a hub dataset's or model's branch or tag. A commit is returned without asking the hub.

    A token for a private one comes from the environment (HF_TOKEN) and goes to the hub alone.
    timeout_s: HF_HUB_ETAG_TIMEOUT in the environment wins over it.
    Raises Unresolved, which says whether the name is wrong or (HubUnreachable) the hub is out of reach.
    """
    if _COMMIT.fullmatch(revision):
        return Resolved(revision, None)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    check_token()
    api = HfApi()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        info = ask(id, revision=revision, timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or timeout_s))
    except RevisionNotFoundError:
        raise Unresolved(f"{kind} {id}: has no revision {revision!r}") from None
    except GatedRepoError:
        raise Unresolved(f"{kind} {id}: is gated; ask for access on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        hint = "if it is a local folder, it does not exist" if kind == "model" else "for local files use path"
        raise Unresolved(f"{kind} {id}: the hub knows no such {kind} (private ones need HF_TOKEN); {hint}") from None
    except (HTTPError, OSError, ValueError) as error:  # HTTPError, from the hub client's HTTP library, is no OSError
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise HubUnreachable(
            f"{kind} {id} at {revision}: the hub cannot be reached ({reason}); "
            "write a full commit as the revision to work without asking"
        ) from None
    return Resolved(str(info.sha), _licence(info.card_data))


def _licence(card: Any) -> str | None:
    """The licence that a card on the hub states, in a line."""
    names = card.get("license") if card is not None else None
    if names == "other":
        names = card.get("license_name") or names
    return ", ".join(map(str, names)) if isinstance(names, list) else str(names) if names else None


def template_path(recipe: Recipe) -> Path | None:
    """The file of `chat_template.template`; None means the tokenizer's own. Raises FileNotFoundError."""
    name = recipe.chat_template.template
    if name is None:
        return None
    path = TEMPLATES / f"{name}.jinja" if re.fullmatch(r"[A-Za-z0-9_-]+", name) else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
        raise FileNotFoundError(f"chat_template.template: found {name!r}; it is no file, and ours are: {known}")
    return path


def _digest_model(recipe: Recipe) -> str:
    """A digest of the files that determine the model's outputs and its stop tokens."""
    key = "model.model_name_or_path"
    folder = _folder(str(recipe.model.model_name_or_path), key)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{key}: {folder} holds no config.json, so it is no model's folder")
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        others = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise FileNotFoundError(f"{key}: {folder} holds no .safetensors weights, the only kind we load ({others})")
    names = ("config.json", "generation_config.json", "model.safetensors.index.json")
    code = folder.glob("*.py") if recipe.model.trust_remote_code else ()
    return digest_files(sorted([*weights, *code, *(folder / name for name in names if (folder / name).is_file())]))


def _digest_tokenizer(recipe: Recipe) -> str:
    key = "model.tokenizer_name_or_path"
    folder = _folder(recipe.model.tokenizer, key)
    files = [path for path in folder.iterdir() if path.name.startswith(_TOKENIZER_FILES) and path.is_file()]
    if not files:
        raise FileNotFoundError(f"{key}: {folder} holds no tokenizer files (tokenizer.json)")
    return digest_files(sorted(files))


def _folder(name: str, key: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{key}: found {name!r}; no such folder (looked in {Path.cwd()})")
    return folder


def _unchanged(key: str, pinned: str | None, now: str) -> None:
    """Raises ValueError for files that changed after pinning: the output would get the key of the old files."""
    assert pinned is not None, f"{key}: a local file always has a pin"
    if now != pinned:
        raise ValueError(f"{key}: changed since this run began ({pinned[:12]} then, {now[:12]} now); start a new run")
