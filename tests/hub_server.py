"""A hub on loopback: enough of the Hugging Face Hub's HTTP interface for its real clients, run unmodified.

Invariant: a commit's 40-hex id is a hash of its paths and contents, and a commit once published stays servable.

    with HubServer() as server:
        commit = server.publish("datasets", "org/name", {"README.md": b"...", "data/train.jsonl": b"..."})
        subprocess.run([sys.executable, "-c", code], env=server.environment(tmp_path))  # HF_ENDPOINT is read at import

What is pushed comes in as the hub takes it from a client without Xet: weights by LFS, other files in the commit itself,
by a token that `enrol` made known.

Unlike the hub: no Xet, one-page listings, full commit ids only; an unknown repository is 404, never 401.
"""

import base64
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

import yaml

Kind = Literal["datasets", "models"]
Access = Literal["public", "gated", "private"]

_API = re.compile(r"/api/(?P<kind>datasets|models)/(?P<repo_id>[^/]+/[^/]+)(?:/(?P<call>revision|tree)/(?P<rest>.+))?")
_RESOLVE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_WRITE = re.compile(
    r"/api/(?P<kind>datasets|models)/(?P<repo_id>[^/]+/[^/]+)/(?P<call>preupload|commit|branch)/(?P<revision>[^/]+)"
)
_LFS_BATCH = re.compile(r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_CARD = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Request:
    """What one client call asked for and got. `num_bytes` is the announced length: a reader may hang up earlier."""

    method: str
    path: str
    has_authorization: bool
    status: int
    num_bytes: int


@dataclass
class _RefusalError(Exception):
    """An error answer, with the code from which huggingface_hub picks its exception."""

    status: int
    code: str
    commit: str = ""


def blob_oid(content: bytes) -> str:
    """The git object id of a file, which the hub sends as the ETag of a file that is not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """Serves what was published, and every folder `<root>/<datasets|models>/<namespace>/<name>/<revision>/`."""

    def __init__(self, root: Path | None = None) -> None:
        self.root, self.requests = root, list[Request]()
        # Keyed by kind and repository id. The revisions are branches, tags and commits, each to its commit.
        self.revisions: dict[tuple[str, str], dict[str, str]] = {}
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.access: dict[tuple[str, str], tuple[Access, str]] = {}
        self.accounts: dict[str, dict[str, Any]] = {}  # what /api/whoami-v2 says of each token
        self.large_files: dict[str, bytes] = {}  # by SHA-256
        self.publish_folders()

    def publish(self, kind: Kind, repo_id: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Make `files` the whole content of a branch or tag; returns the commit. Earlier commits stay servable."""
        commit = blob_oid(json.dumps({path: blob_oid(files[path]) for path in sorted(files)}).encode())
        self.commits.setdefault((kind, repo_id), {})[commit] = dict(files)
        self.revisions.setdefault((kind, repo_id), {}).update({revision: commit, commit: commit})
        return commit

    def publish_folders(self) -> None:
        """Publish the folders under `root` as they are now; call it again after changing a file there."""
        for folder in sorted(self.root.glob("*/*/*/*/")) if self.root else []:
            kind, namespace, name, revision = folder.relative_to(self.root).parts
            files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
            self.publish(kind, f"{namespace}/{name}", files, revision)

    def restrict(self, kind: Kind, repo_id: str, token: str, access: Access = "gated") -> None:
        """As on the hub: gated files need the token but info and listings do not; a private repository hides all."""
        self.access[kind, repo_id] = access, token

    def enrol(self, token: str, name: str, role: str = "write", orgs: dict[str, str] | None = None) -> dict[str, Any]:
        """Make a token known; orgs: the role in each. Returns what the hub will say of it, to be changed if need be."""
        self.accounts[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"type": "org", "name": org, "roleInOrg": held} for org, held in (orgs or {}).items()],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }
        return self.accounts[token]

    def num_writes(self) -> int:
        """How many requests there were that could change something."""
        return sum(request.method not in ("GET", "HEAD") for request in self.requests)

    def environment(self, home: Path) -> dict[str, str]:
        """The whole environment of a client process: this hub, caches under `home`, no token, no other host."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HF_HOME": str(home / "huggingface"),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # Otherwise load_dataset sends a HEAD to s3.amazonaws.com.
            "NO_PROXY": "127.0.0.1",
        }

    def num_downloads(self, path_suffix: str = "") -> int:
        """How many times the content of a file, whole or a range, was sent."""
        sent = [r.path for r in self.requests if r.method == "GET" and r.status in (200, 206)]
        return sum("/resolve/" in path and path.endswith(path_suffix) for path in sent)

    def __enter__(self) -> Self:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("_BoundHandler", (_Handler,), {"hub": self}))
        self.endpoint, self.is_open = f"http://127.0.0.1:{self._http.server_port}", True
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Headers and body are two writes: with Nagle each answer waits 40 ms.

    def do_GET(self) -> None:
        if not self.hub.is_open:  # A connection kept alive outlives the listening socket.
            self.close_connection = True
            return
        url = urlsplit(self.path)
        try:
            if url.path == "/api/whoami-v2":
                self._send_json(200, self._account())
            elif match := _RESOLVE.fullmatch(url.path):
                self._send_file(match["kind"] or "models", match["repo_id"], match["revision"], unquote(match["path"]))
            elif match := _API.fullmatch(url.path):
                answer = self._api(**match.groupdict(), is_recursive="recursive=true" in url.query)
                self._send_json(200, answer)
            else:
                raise _RefusalError(404, "NotFound")
        except _RefusalError as refusal:
            self._send(refusal.status, b"", {"X-Error-Code": refusal.code, "X-Repo-Commit": refusal.commit})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self._body()  # also of what is refused: the connection goes on
        path = urlsplit(self.path).path
        try:
            if path == "/api/repos/create":
                self._create(json.loads(body))
            elif path == "/api/validate-yaml":
                self._validate(json.loads(body)["content"])
            elif match := _LFS_BATCH.fullmatch(path):
                self._writer(match["repo_id"])
                self._send_json(
                    200, {"transfer": "basic", "objects": self._upload_actions(json.loads(body)["objects"])}
                )
            elif match := _WRITE.fullmatch(path):
                self._writer(match["repo_id"])
                answer = getattr(self, f"_{match['call']}")(
                    (match["kind"], match["repo_id"]), unquote(match["revision"]), body
                )
                self._send_json(200, answer)
            else:
                raise _RefusalError(404, "NotFound")
        except _RefusalError as refusal:
            self._send(refusal.status, b"", {"X-Error-Code": refusal.code})

    def do_PUT(self) -> None:
        """A large file, where an upload action said."""
        body, oid = self._body(), self.path.rpartition("/")[2]
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.hub.large_files[oid] = body
        self._send(200 if good else 400, b"", {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _account(self) -> dict[str, Any]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.accounts:
            raise _RefusalError(401, "InvalidToken")
        return self.hub.accounts[token]

    def _writer(self, repo_id: str) -> None:
        account, owner = self._account(), repo_id.partition("/")[0]
        roles = {account["name"]: "admin"} | {org["name"]: org["roleInOrg"] for org in account["orgs"]}
        if account["auth"]["accessToken"]["role"] == "read" or roles.get(owner) not in ("admin", "write"):
            raise _RefusalError(403, "Forbidden")

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization'] or self._account()['name']}/{asked['name']}"
        self._writer(repo_id)
        if (is_there := ("models", repo_id) in self.hub.revisions) is False:
            self.hub.publish("models", repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
            if asked.get("visibility") == "private":
                self.hub.restrict("models", repo_id, self.headers["Authorization"].removeprefix("Bearer "), "private")
        self._send_json(409 if is_there else 200, {"url": f"{self.hub.endpoint}/{repo_id}"})

    def _validate(self, content: str) -> None:
        """As the hub does with a README.md: metadata is YAML, a mapping, and its model index is whole."""
        errors = []
        try:
            data = yaml.safe_load(found[1]) if (found := _CARD.match(content)) else {}
            for result in [result for model in data.get("model-index", []) for result in model["results"]]:
                assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
                assert all(isinstance(metric["value"], float | int) for metric in result["metrics"])
        except (yaml.YAMLError, AttributeError, KeyError, AssertionError) as error:
            errors = [{"message": f"{type(error).__name__}: {error}"}]
        self._send_json(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, repository: tuple[str, str], revision: str, body: bytes) -> dict[str, Any]:
        there = self.hub.commits[repository][self._commit_of(repository, revision, wants_content=True)]
        files = []
        for asked in json.loads(body)["files"]:
            is_large = asked["path"].endswith(".safetensors")
            old = there.get(asked["path"])
            oid = old and (hashlib.sha256(old).hexdigest() if is_large else blob_oid(old))
            mode = "lfs" if is_large else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _upload_actions(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Where each large file is to be sent; nowhere, where it is here already."""
        actions = {one["oid"]: {"upload": {"href": f"{self.hub.endpoint}/large/{one['oid']}"}} for one in objects}
        return [
            {**one, **({} if one["oid"] in self.hub.large_files else {"actions": actions[one["oid"]]})}
            for one in objects
        ]

    def _commit(self, repository: tuple[str, str], revision: str, body: bytes) -> dict[str, Any]:
        head = self._commit_of(repository, revision, wants_content=True)
        files = dict(self.hub.commits[repository][head])
        for line in body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise _RefusalError(400, "LfsObjectMissing")
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = self.hub.publish(repository[0], repository[1], files, revision)
        return {"commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repository[1]}/commit/{commit}"}

    def _branch(self, repository: tuple[str, str], name: str, body: bytes) -> dict[str, Any]:
        if name in self.hub.revisions[repository]:
            raise _RefusalError(409, "Conflict")
        self.hub.revisions[repository][name] = self.hub.revisions[repository]["main"]
        return {}

    def _commit_of(self, repository: tuple[str, str], revision: str, wants_content: bool) -> str:
        if repository not in self.hub.revisions:
            raise _RefusalError(404, "RepoNotFound")
        (access, token), authorization = (
            self.hub.access.get(repository, ("public", "")),
            self.headers.get("Authorization"),
        )
        if access == "private" and authorization != f"Bearer {token}":
            raise _RefusalError(401, "RepoNotFound")
        if access == "gated" and wants_content and authorization != f"Bearer {token}":
            raise _RefusalError(403 if authorization else 401, "GatedRepo")
        if unquote(revision) not in self.hub.revisions[repository]:
            raise _RefusalError(404, "RevisionNotFound")
        return self.hub.revisions[repository][unquote(revision)]

    def _api(self, kind: str, repo_id: str, call: str | None, rest: str | None, is_recursive: bool) -> object:
        revision, _, folder = (rest or "main").partition("/")
        commit = self._commit_of((kind, repo_id), revision, wants_content=False)
        files = self.hub.commits[kind, repo_id][commit]
        if call != "tree":
            access, _ = self.hub.access.get((kind, repo_id), ("public", ""))
            card = _CARD.match(files.get("README.md", b"").decode(errors="replace"))
            flags = {"private": access == "private", "gated": access == "gated" and "auto", "tags": []}
            flags |= {"cardData": yaml.safe_load(card[1])} if card else {}
            return {"id": repo_id, "sha": commit, "siblings": [{"rfilename": path} for path in sorted(files)], **flags}
        prefix = f"{unquote(folder)}/" if folder else ""
        inside = [entry for entry in _tree(files) if entry["path"].startswith(prefix)]
        if not inside and prefix:
            raise _RefusalError(404, "EntryNotFound", commit)
        return [entry for entry in inside if is_recursive or "/" not in entry["path"].removeprefix(prefix)]

    def _send_file(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit_of((kind, repo_id), revision, wants_content=True)
        if (content := self.hub.commits[kind, repo_id][commit].get(path)) is None:
            raise _RefusalError(404, "EntryNotFound", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_oid(content)}"', "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            if (start := int(match[1])) >= len(content):
                raise _RefusalError(416, "RangeNotSatisfiable", commit)
            end = min(int(match[2] or len(content)) + 1, len(content))
            self._send(206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})
        else:
            self._send(200, content, headers)

    def _send_json(self, status: int, answer: object) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        sent = b"" if self.command == "HEAD" else body
        # Record first: a client that has its answer must find it in `requests`.
        self.hub.requests.append(Request(self.command, self.path, "Authorization" in self.headers, status, len(sent)))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        with suppress(BrokenPipeError, ConnectionResetError):  # A streaming reader hangs up once it has enough rows.
            self.end_headers()
            self.wfile.write(sent)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `requests` is the log."""


def _tree(files: dict[str, bytes]) -> list[dict[str, str | int]]:
    """The files and folders of a commit, by path, in the shape of the hub's tree listing."""
    every = {parent.as_posix(): b"" for path in files for parent in Path(path).parents if parent.name} | files
    kinds = {path: "file" if path in files else "directory" for path in sorted(every)}
    return [{"type": kinds[p], "oid": blob_oid(every[p]), "size": len(every[p]), "path": p} for p in kinds]
