import math
from collections.abc import Callable

import numpy as np
import pytest

from sft_core.evaluate.scores import (
    Score,
    mean_score,
    perplexity,
    strip_thinking,
    token_accuracy,
    token_loss,
)


@pytest.mark.parametrize(
    ("output", "left"),
    [
        ("4", "4"),
        ("<think>\n3:3 1:4\n</think>\n\n4\n", "4"),
        ("<think></think>4", "4"),
        ("<think>a</think>4<think>b</think>", "4"),
        ("<think>3:3 1:4 4", ""),  # it never ends
        ("<think>a</think>4<think>b", "4"),
        ("3:3 1:4\n</think>\n\n4", "4"),  # the prompt opened the block
        ("a<think>b</think>4", "a4"),
        ("", ""),
    ],
)
def test_strip_thinking_any_block_is_left_out(output: str, left: str) -> None:
    assert strip_thinking(output) == left


def rows(n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose length and loss a token hang together, as those of long reasoning do."""
    rng = np.random.default_rng(0)
    num_trained = rng.integers(2, 60, n)
    return num_trained * rng.gamma(4, 0.2, n) + 0.3 * num_trained, num_trained


def bootstrap_std(n: int, statistic: Callable[[np.ndarray], float]) -> float:
    rng = np.random.default_rng(1)
    return float(np.std([statistic(rng.integers(0, n, n)) for _ in range(3000)]))


def test_token_loss_is_the_mean_over_tokens_with_the_bootstrap_error() -> None:
    sums, counts = rows()
    score = token_loss(sums, counts)
    each_token = np.repeat(sums / counts, counts)
    assert score.value == pytest.approx(each_token.mean(), rel=1e-12)
    assert score.value != pytest.approx((sums / counts).mean(), rel=1e-3), "not the mean over rows"
    assert (score.metric, score.n) == ("loss", 200)
    error = bootstrap_std(200, lambda drawn: sums[drawn].sum() / counts[drawn].sum())
    assert score.stderr == pytest.approx(error, rel=0.08)


def test_perplexity_is_the_exponential_of_the_loss_with_the_bootstrap_error() -> None:
    sums, counts = rows()
    score = perplexity(token_loss(sums, counts))
    assert score.value == pytest.approx(math.exp(sums.sum() / counts.sum()))
    assert (score.metric, score.n) == ("perplexity", 200)
    error = bootstrap_std(200, lambda drawn: math.exp(sums[drawn].sum() / counts[drawn].sum()))
    assert score.stderr == pytest.approx(error, rel=0.08)
    assert perplexity(token_loss(np.array([5000.0]), np.array([2]))).to_json()["value"] == math.exp(700)


@pytest.mark.parametrize(("value", "stderr"), [(math.nan, None), (math.inf, 0.1), (1.0, math.nan)])
def test_score_that_is_not_finite_is_not_written(value: float, stderr: float | None) -> None:
    with pytest.raises(ValueError, match=r"exact_match: the score is .*finite number"):
        Score("exact_match", value, stderr, 9).to_json()


def test_token_accuracy_is_the_share_of_all_tokens_with_the_bootstrap_error() -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(2, 60, 200)
    correct = rng.binomial(counts, 0.9 - counts / 120)  # longer rows are harder: not the mean over rows
    score = token_accuracy(correct, counts)
    assert score.value == pytest.approx(correct.sum() / counts.sum())
    assert score.value < (correct / counts).mean() - 0.02
    assert (score.metric, score.n) == ("token_accuracy", 200)
    error = bootstrap_std(200, lambda drawn: correct[drawn].sum() / counts[drawn].sum())
    assert score.stderr == pytest.approx(error, rel=0.08)


def test_mean_score_has_the_bootstrap_error() -> None:
    values = (np.arange(120) % 3 == 0).astype(float)
    score = mean_score("exact_match", values)
    assert score.value == pytest.approx(1 / 3)
    assert (score.metric, score.n) == ("exact_match", 120)
    assert score.stderr == pytest.approx(bootstrap_std(120, lambda drawn: values[drawn].mean()), rel=0.08)


def test_scores_one_row_have_no_error() -> None:
    assert token_loss(np.array([3.0]), np.array([2])).stderr is None
    assert mean_score("exact_match", np.array([1.0])).stderr is None
    assert perplexity(token_loss(np.array([3.0]), np.array([2]))).stderr is None
    assert token_loss(np.array([3.0]), np.array([2])).value == 1.5
