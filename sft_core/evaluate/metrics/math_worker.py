"""The process that compares mathematical answers: a JSON line in, one out. It holds no model and may be killed."""

from __future__ import annotations

import json
import logging
import re
import resource
import sys
from decimal import Decimal
from typing import Any

from sft_core.die_with_parent import die_with_parent

MAX_BYTES = 4 * 2**30  # a tower of powers must not take the machine's memory
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,2})(?![\w.]*\d)")


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of timeouts, which math_answers.py keeps
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not look like an answer
    is_equal("1", "$1$")  # load its libraries now: later the time for a comparison runs
    _write(answers, True)
    for line in sys.stdin:
        wanted, output = json.loads(line)
        _write(answers, is_equal(wanted, output) if output is not None else bool(_parsed(wanted)))


def is_equal(wanted: str, output: str) -> bool:
    from math_verify import verify

    return bool(verify(_parsed(wanted), _parsed(output), timeout_seconds=None))


def _parsed(text: str) -> list[Any]:
    """The expressions that a text states. The library would read 1e3 as 1, so write such numbers out."""
    from math_verify import parse

    plain = _SCIENTIFIC.sub(lambda match: f"{Decimal(f'{match[1]}e{match[2]}'):f}", text)
    return parse(plain, parsing_timeout=None)


def _write(answers: Any, value: bool) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
