"""The toy conversation: a template that no row can be trained with is refused, and every family's passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_core.data.tokens.toy import RenderingArguments, ToyTrial, try_rendering, try_renderings
from tests.data.families import CHATML, FAMILIES, family

FINE = ToyTrial()
POLICY = {"loss_scope": "assistant", "thinking": "keep", "empty_thinking": "as_served", "served_prefix": "tokens"}
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML_SOURCE = f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}"


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., RenderingArguments]:
    def of(name: str, source: str | None = None, stops: list[str] | None = None, **policy: str) -> RenderingArguments:
        chat, folder = family(name), tmp_path / name
        if not folder.exists():
            chat.vocabulary.save_pretrained(folder)
        return {
            "tokenizer": {
                "path": str(folder),
                "revision": None,
                "add_special_tokens": [],
                "eos_token": None,
                "trust_remote_code": False,
            },
            "template": {"source": chat.source if source is None else source, "kwargs": {}, "date": "2026-01-01"},
            "stop_tokens": list(chat.extra_stop_tokens) if stops is None else stops,
            "policy": {**POLICY, **policy},
        }

    return of


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_template_passes_under_each_policy(name: str, arguments: Callable[..., Any]) -> None:
    choices = [
        {},
        *({"loss_scope": scope} for scope in ("completion", "all")),
        *({"thinking": thinking} for thinking in ("drop", "only_last", "inline")),
        *({"empty_thinking": empty} for empty in ("trained", "masked")),
        {"served_prefix": "text"},
    ]
    trials = [try_rendering(arguments(name, **policy)) for policy in choices]
    assert [trial.error for trial in trials] == [None] * len(choices)
    warned = {policy.get("thinking") for policy, trial in zip(choices, trials, strict=True) if trial.warning}
    assert warned == ({"inline"} if name == "deepseek_r1" else set()), "whose template cuts thinking out of answers"


def test_template_that_refuses_system_messages_is_not_at_fault(arguments: Callable[..., Any]) -> None:
    refuses = "{% if messages and messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    assert try_rendering(arguments("chatml", refuses + CHATML_SOURCE)) == FINE


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (CHATML_SOURCE.replace("m.content", "m.content | nonsense"), "No filter named 'nonsense'"),
        (CHATML_SOURCE.replace("m.content", "m.content.nothing.here"), "has no attribute 'nothing'"),
        (f"{{% for m in messages if m.role != 'assistant' %}}{TURN}{{% endfor %}}{PROMPT}", "toy conversation"),
        (f"{{% for m in messages if m.role != 'user' %}}{TURN}{{% endfor %}}{PROMPT}", "has no 'How many legs"),
        (CHATML_SOURCE.replace("m.content", "m.content | upper"), "the rendered turn has no 'A spider has"),
        (CHATML_SOURCE.replace("<|im_end|>", "<|endoftext|>"), "serving stops at '<|im_end|>'"),
        (CHATML_SOURCE.replace("<|im_end|>", ""), "ends without a stop token"),
    ],
)
def test_template_that_no_row_can_be_trained_with_is_an_error(
    source: str, message: str, arguments: Callable[..., Any]
) -> None:
    assert set(CHATML) >= {"<|im_end|>", "<|endoftext|>"}
    assert try_rendering(arguments("chatml", CHATML_SOURCE)) == FINE
    error = try_rendering(arguments("chatml", source)).error
    assert error is not None and message in error


def test_template_that_fails_on_system_messages_is_a_warning(arguments: Callable[..., Any]) -> None:
    fails = "{% if messages and messages[0].role == 'system' %}{{ nothing.here }}{% endif %}"
    trial = try_rendering(arguments("chatml", fails + CHATML_SOURCE))
    assert trial.error is None and trial.warning is not None and "'nothing' is undefined" in trial.warning


def test_thinking_that_the_template_names_and_drops_is_a_warning(arguments: Callable[..., Any]) -> None:
    mentions = "{% set thinking = false %}"
    trial = try_rendering(arguments("chatml", mentions + CHATML_SOURCE))
    assert trial.error is None and trial.warning is not None
    assert "whose assistant thinks cannot be trained" in trial.warning and "leaves out" in trial.warning
    assert try_rendering(arguments("chatml", mentions + CHATML_SOURCE, thinking="drop")) == FINE
    assert try_rendering(arguments("chatml", CHATML_SOURCE)) == FINE


def test_raw_text_does_not_meet_the_template(arguments: Callable[..., Any]) -> None:
    trial = try_rendering(arguments("chatml", "{{ nothing.here }}", loss_scope="all"))
    assert trial.error is None and trial.warning is not None


def test_tokenizer_and_stop_tokens_are_tried_too(arguments: Callable[..., Any], tmp_path: Path) -> None:
    error = try_rendering(arguments("chatml", stops=["<|nowhere|>"])).error
    assert error is not None and error.startswith("model.stop_tokens: found '<|nowhere|>'")
    missing = arguments("chatml")
    missing["tokenizer"]["path"] = str(tmp_path / "nowhere")
    assert try_rendering(missing).error is not None
    (tmp_path / "chatml" / "tokenizer.json").write_text("{}")
    torn = try_rendering(arguments("chatml"))
    assert not torn.loads and torn.error is not None and "chatml" in torn.error


def test_tokenizer_that_loses_a_letter_fails_in_the_mask_proof(arguments: Callable[..., Any], tmp_path: Path) -> None:
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"p"})
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*CHATML])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(tmp_path / "chatml")
    error = try_rendering(arguments("chatml", CHATML_SOURCE)).error
    assert error is not None and "mask proof" in error


@pytest.mark.slow
def test_renderings_are_tried_without_torch_in_a_process_of_their_own(
    arguments: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    good, bad = try_renderings([arguments("chatml"), arguments("chatml", stops=["<|nowhere|>"])])
    assert good == FINE and bad.error is not None
