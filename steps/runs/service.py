"""Checks before any work that the metadata service answers, if Metaflow is configured to use one."""

from __future__ import annotations

import os
from collections.abc import Sequence

TIMEOUT_S = 5
RECORDS = ("run", "resume")  # the flow's commands that write runs


def check_service(arguments: Sequence[str] = RECORDS) -> None:
    """Raises ValueError if the command line selects a service that does not answer. Otherwise no service is asked.

    Metaflow itself asks five times over 15 seconds and ends in a traceback, or waits for ever where nothing answers.
    """
    from metaflow.metaflow_config import DEFAULT_METADATA, SERVICE_URL

    if not set(RECORDS) & set(arguments) or _metadata(arguments, DEFAULT_METADATA) != "service":
        return
    if fault := _fault(SERVICE_URL):
        raise ValueError(
            f"METAFLOW_SERVICE_URL: found {SERVICE_URL or 'nothing'}, where no Metaflow metadata service answers "
            f"({fault}). Runs are recorded in one because METAFLOW_DEFAULT_METADATA (in the environment or in "
            "~/.metaflowconfig) or --metadata says `service`. Start it (`make ui`, see deploy/metaflow-ui), "
            "give its URL, or record runs in .metaflow: METAFLOW_DEFAULT_METADATA=local"
        )


def _metadata(arguments: Sequence[str], default: str) -> str:
    """The kind of metadata that a command line chooses; Metaflow takes the option before the command."""
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == "--metadata":
            return value
        if option.startswith("--metadata="):
            return option.removeprefix("--metadata=")
    return os.environ.get("METAFLOW_METADATA", default)  # Metaflow's other way to give the option


def _fault(url: str | None) -> str | None:
    """Why no service answers at the URL, in a few words; None where one does."""
    import requests
    from metaflow.metaflow_config import SERVICE_HEADERS

    if not url:
        return "it is not set"
    try:
        answer = requests.get(f"{url.rstrip('/')}/ping", headers=dict(SERVICE_HEADERS), timeout=TIMEOUT_S)
    except requests.exceptions.Timeout:
        return f"no answer within {TIMEOUT_S} s"
    except requests.exceptions.ConnectionError:
        return "no connection"
    except requests.exceptions.RequestException as error:
        return str(error)
    return None if answer.ok else f"GET /ping gives {answer.status_code} {answer.reason}"
