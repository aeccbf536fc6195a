"""The release on the hub: one commit, by the token HF_TOKEN of the environment, which only the hub sees.

check_push finds before any work what would stop a push: a token that is missing, unknown, or may not write.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.data.sources.hub_token import check_token

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from sft_core.store.stage import Build

log = logging.getLogger(__name__)
_WRITERS = ("admin", "write", "contributor")  # roles in an organisation
_CHECKPOINT = (".safetensors", ".json", ".jinja", ".bin", ".model")  # a loader would read such a file beside ours


def build_pushed(build: Build, *, model_id: str, private: bool, revision: str) -> dict[str, str]:
    """Uploads the release, and writes its address to pushed.json. Raises ValueError or OSError with what to do."""
    with _hub_errors(model_id):
        api = _api()
        check_visibility(api, model_id, private)
        api.create_repo(model_id, private=private, exist_ok=True)
        if revision != "main":
            api.create_branch(model_id, branch=revision, exist_ok=True)
        record = commit(api, build.inputs["release"] / "model", model_id, revision)
    (build.out / "pushed.json").write_text(json.dumps(record, indent=1) + "\n")
    log.info("pushed=%s", record["url"])
    return record


def commit(api: HfApi, folder: Path, model_id: str, revision: str) -> dict[str, str]:
    """Pushes the folder's files as one commit, which also deletes checkpoint files that the folder does not have."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    on_hub = api.list_repo_files(model_id, revision=revision)
    stale = [name for name in on_hub if name not in files and name.endswith(_CHECKPOINT)]
    # Not upload_folder: with Xet it makes several commits, and between them a reader would see half a release.
    pushed = api.create_commit(
        model_id,
        [
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
        ],
        commit_message="Checkpoint and model card",
        revision=revision,
    )
    url = f"{api.endpoint}/{model_id}/tree/{pushed.oid}"
    return {"model_id": model_id, "revision": revision, "commit": pushed.oid, "url": url}


def check_push(model_id: str, private: bool) -> None:
    """Asks the hub whether this token may push. Raises ValueError or OSError, one line, for what would stop it."""
    with _hub_errors(model_id):
        api = _api()
        if fault := may_not_write(api.whoami(), model_id):
            raise ValueError(f"hub.model_id: found {model_id}; {fault}")
        check_visibility(api, model_id, private)


def may_not_write(who: dict[str, Any], model_id: str) -> str | None:
    """Why a token may not write to the repository; None when it may. who: the hub's answer to whoami."""
    owner = model_id.partition("/")[0]
    roles = {who["name"]: "admin", **{org["name"]: org.get("roleInOrg", "write") for org in who.get("orgs", [])}}
    if owner not in roles:
        return f"HF_TOKEN is of {who['name']}, who may write for {', '.join(sorted(roles))}"
    if roles[owner] not in _WRITERS:
        return f"HF_TOKEN is of {who['name']}, who may only {roles[owner]} in {owner}"
    token = who.get("auth", {}).get("accessToken", {})
    role = token.get("role", "write")
    if role == "fineGrained":
        scopes = token.get("fineGrained", {}).get("scoped", [])
        granted = [scope for scope in scopes if scope.get("entity", {}).get("name") in (owner, model_id)]
        if not any("repo.write" in scope.get("permissions", []) for scope in granted):
            return f"HF_TOKEN has no permission to write to repositories of {owner}; add it to the token on the hub"
    elif role != "write":
        return f"HF_TOKEN may only {role}; make a token that may write, on the hub"
    return None


def check_visibility(api: HfApi, model_id: str, private: bool) -> None:
    """Raises ValueError if the repository exists, and is private where the recipe says public, or the reverse."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_private = bool(api.model_info(model_id).private)
    except RepositoryNotFoundError:
        return
    if is_private != private:
        word = {True: "private", False: "public"}
        raise ValueError(
            f"hub.private: found {str(private).lower()}; {model_id} is there and {word[is_private]}; make it "
            f"{word[private]} on the hub, or set hub.private to {str(is_private).lower()}"
        )


def _api() -> HfApi:
    from huggingface_hub import HfApi

    token = (os.environ.get("HF_TOKEN") or "").strip()
    if not token:
        raise ValueError("HF_TOKEN: not set in the environment; hub.model_id wants a token that may write")
    check_token()
    return HfApi(token=token)


@contextlib.contextmanager
def _hub_errors(model_id: str) -> Iterator[None]:
    """Raises the hub client's errors as one line each, with what to do and without the token."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == 401:
            raise ValueError("HF_TOKEN: the hub does not know this token; set one that may write") from None
        reason = error.server_message or _without_token(str(error)).splitlines()[0]
        raise OSError(f"push to {model_id}: the hub refused it ({status}: {_without_token(reason)})") from None
    except HTTPError as error:
        reason = _without_token(f"{type(error).__name__}: {error}").splitlines()[0]
        raise ConnectionError(
            f"push to {model_id}: the hub cannot be reached ({reason}); start again when it can, or remove the "
            "recipe's hub section: what is built stays"
        ) from None
    except RuntimeError as error:  # a failed upload of a file; its cause is the client's own error
        reason = _without_token(f"{error} {error.__cause__ or ''}").strip().splitlines()[0]
        raise OSError(f"push to {model_id}: {reason}; start again, what is there is not sent twice") from None


def _without_token(text: str) -> str:
    token = (os.environ.get("HF_TOKEN") or "").strip()
    return text.replace(token, "***") if token else text
