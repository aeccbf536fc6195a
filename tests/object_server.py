"""Object storage on loopback: moto's S3, with a record of what was asked, and places where a request can be held.

with ObjectServer() as server:
    url = server.bucket("outputs")  # s3://outputs, for clients that run with server.environment
    server.requests.clear()
"""

import functools
import logging
import re
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class Request(NamedTuple):
    method: str
    path: str  # /bucket/key
    query: str


class ObjectServer:
    """`refuse` answers 403, and `hold` does not answer, where `METHOD /path` matches the pattern."""

    def __init__(self) -> None:
        self.requests: list[Request] = []  # in the order in which they were answered
        self.refuse = self.hold = ""
        self.num_held = 0
        self._app = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"])
        asked = f"{request.method} {request.path}"
        if self.hold and re.search(self.hold, asked):
            self.num_held += 1
            while self.hold:
                time.sleep(0.01)
        if self.refuse and re.search(self.refuse, asked):
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        answer = self._app(environ, start_response)
        self.requests.append(request)
        return answer

    def bucket(self, name: str) -> str:
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def names(self, bucket: str) -> list[str]:
        found = self.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        return [entry["Key"] for entry in found]

    @functools.cached_property
    def client(self) -> Any:
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find it, and to find nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "not-to-be-told",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> Self:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # `requests` is the log
        self._http = make_server("127.0.0.1", 0, self, threaded=True)
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold = ""
        self._http.shutdown()
        self._http.server_close()
