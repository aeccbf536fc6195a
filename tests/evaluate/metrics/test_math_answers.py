"""Numeric answers are equal in value, and one that does not end is given up, from any thread."""

import os
import threading
import time

import pytest

from sft_core.evaluate.metrics.math_answers import Numeric
from sft_core.evaluate.metrics.metric import Question
from tests.train.tiny import processes_naming

# Too large for any machine; sympy does not find the difference of the two towers without their values.
ENDLESS = "$9^{9^{9^{9^9}}}+1-9^{9^{9^{9^9}}}$"


@pytest.fixture(scope="module")
def numeric():
    with Numeric() as metric:
        yield metric


@pytest.mark.parametrize(
    ("answer", "output", "right"),
    [
        ("18", "She makes $18 every day.", True),
        ("18", "3 * 6 = 18", True),
        ("18", "\\boxed{18}", True),
        ("1234", "1,234", True),
        ("1/2", "0.5", True),
        ("\\frac{1}{2}", "0.50", True),
        ("1000", "1e3", True),
        ("2.5e-2", "0.025", True),
        ("$x+1$", "$1+x$", True),
        ("4", "44", False),
        ("18", "18 is too much, so 17", False),
        ("1000", "1", False),
        ("1e3", "1", False),
        ("4", "", False),
        ("4", "four", False),
    ],
)
def test_numeric_equal_values_are_right(numeric: Numeric, answer: str, output: str, right: bool) -> None:
    asked = numeric.ask(Question("0", answer, ""))
    assert asked is not None
    assert numeric.score(output, asked.wanted) == float(right)
    assert numeric.num_timeouts == 0


def test_numeric_answer_without_a_value_is_refused(numeric: Numeric) -> None:
    with pytest.raises(ValueError, match=r"found 'blue'; numeric wants a number"):
        numeric.ask(Question("0", "blue", ""))


@pytest.mark.slow
def test_numeric_endless_answer_in_a_thread_is_given_up_and_counted() -> None:
    found: list[float] = []

    def compare() -> None:
        with Numeric(timeout_s=2) as metric:
            found.extend(metric.score(output, "2") for output in ("2", ENDLESS, "2"))
            found.append(metric.num_timeouts)

    thread, started = threading.Thread(target=compare), time.monotonic()
    thread.start()
    thread.join(timeout=100)
    assert found == [1, 0, 1, 1]
    assert time.monotonic() - started < 60


def test_numeric_process_ends_with_the_metric() -> None:
    def workers() -> set[int]:
        return set(processes_naming(f"sft_core.evaluate.metrics.math_worker\0{os.getpid()}\0"))

    before = workers()
    with Numeric() as metric:
        assert metric.score("2", "2") == 1
        assert len(workers() - before) == 1
    assert workers() == before
