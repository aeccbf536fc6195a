"""A toy conversation in a recipe's rendering: bad templates are refused before any row is downloaded.

It goes the way of every row: template, spans, tokens, mask proof. A process of its own does it, without torch, which
transformers would import for seconds; so this module is also that process's program.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import jinja2

from sft_core.data.proof.mask import MaskProof
from sft_core.data.rendering.build import RENDERED, Rendering, TemplateArguments, add_row
from sft_core.data.rendering.templates import REASONING_KEYS, TemplateError
from sft_core.data.sources.formats.canonical import Conversation, Message
from sft_core.data.sources.rejects import Rejected
from sft_core.data.tokenizer.encoded import encode_rows
from sft_core.data.tokenizer.tokenizer import PieceEncoder, TokenizerArguments
from sft_core.die_with_parent import die_with_parent

ROOT = Path(__file__).resolve().parents[3]
# Texts of more than a few characters: the proof takes a short one for a part of the template.
SYSTEM: Message = {"role": "system", "content": "You answer in one short sentence."}
USER: Message = {"role": "user", "content": "How many legs does a spider have?"}
ASSISTANT: Message = {"role": "assistant", "content": "A spider has exactly eight legs."}
THINKING: Message = {**ASSISTANT, "reasoning_content": "Spiders are arachnids, so the number is eight."}


class RenderingArguments(TypedDict):
    """The keyword arguments of Rendering.load."""

    tokenizer: TokenizerArguments
    template: TemplateArguments
    stop_tokens: list[str]
    policy: dict[str, str]


@dataclasses.dataclass(frozen=True)
class ToyTrial:
    """What became of the toy conversation.

    error: why no row of the recipe can be used. loads: whether tokenizer and template could be loaded at all.
    """

    error: str | None = None
    warning: str | None = None
    loads: bool = True


def try_renderings(renderings: Sequence[RenderingArguments]) -> list[ToyTrial]:
    """The trial of each rendering, in a process of its own. Raises RuntimeError where that process fails."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sft_core.data.tokens.toy", str(os.getpid())],
        input=json.dumps(renderings),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the toy conversation's process ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return [ToyTrial(**trial) for trial in json.loads(done.stdout.splitlines()[-1])]


def try_rendering(arguments: RenderingArguments) -> ToyTrial:
    """The toy conversation in one rendering. What a template refuses on purpose, as system messages, is no fault."""
    try:
        rendering = Rendering.load(**arguments)
        rows = _Rows(rendering)
    except (OSError, ValueError) as error:
        return ToyTrial(str(error), loads=False)
    except Exception as error:  # a torn tokenizer.json: transformers raises errors of any type
        name = arguments["tokenizer"]["path"]
        return ToyTrial(f"{name}: its tokenizer cannot be loaded ({type(error).__name__}: {error})", loads=False)
    fault = rows.fault([USER, ASSISTANT])
    with_system = rows.fault([SYSTEM, USER, ASSISTANT])
    if fault is not None and with_system is not None:  # a template may want a system message
        message = f"chat_template: a toy conversation of a user and an assistant cannot be trained: {fault}"
        # Rows of raw text do not meet the template.
        return ToyTrial(warning=message) if rendering.policy.loss_scope == "all" else ToyTrial(message)
    if _matters(with_system):
        return ToyTrial(
            warning=f"chat_template: a toy conversation with a system message cannot be trained: {with_system}"
        )
    if not _thinks(rendering) or not _matters(fault := rows.fault([USER, THINKING])):
        return ToyTrial()
    message = f"chat_template: a toy conversation whose assistant thinks cannot be trained: {fault}"
    return ToyTrial(warning=message) if isinstance(fault, Rejected | TemplateError) else ToyTrial(message)


class _Rows:
    """Rows of a rendering, made as the render and tokenize stages make them."""

    def __init__(self, rendering: Rendering):
        self._renderer, self._encoder = rendering.renderer(), PieceEncoder(rendering.vocabulary)
        self._proof = MaskProof(rendering.vocabulary, rendering.template, rendering.stop_tokens, rendering.policy)

    def fault(self, messages: Iterable[Message]) -> ValueError | None:
        """Why the conversation cannot be trained. A Rejected or TemplateError leaves out the row, others end a run."""
        conversation: Conversation = {"messages": [*messages]}
        columns: dict[str, list[object]] = {name: [] for name in RENDERED.names}
        try:
            for row in self._renderer.render(conversation):
                add_row(columns, "toy", 0, 0, None, row)
            encoded = encode_rows(self._encoder, columns)
            self._proof.check([conversation], columns, encoded)
        except ValueError as error:
            return error
        return None if encoded.trained.any() else ValueError("no token of it is trained")


def _matters(fault: ValueError | None) -> bool:
    """Whether there is a fault that the template's author did not mean: raise_exception says what is refused."""
    return fault is not None and type(fault.__context__) is not jinja2.TemplateError


def _thinks(rendering: Rendering) -> bool:
    """Whether the rendering has a place for a turn's thinking: the policy's, or a key that the template reads."""
    if rendering.policy.thinking in ("drop", "inline"):
        return rendering.policy.thinking == "inline"
    code = re.sub(r"\{#.*?#\}", "", rendering.template.source, flags=re.DOTALL)
    return re.search(rf"\b(?:{'|'.join(REASONING_KEYS)})\b", code) is not None


def main() -> None:
    """Reads the arguments of renderings as JSON, and writes a line of JSON with their trials."""
    die_with_parent(int(sys.argv[1]))
    renderings: list[RenderingArguments] = json.load(sys.stdin)
    if not any(rendering["tokenizer"]["trust_remote_code"] for rendering in renderings):
        sys.modules["torch"] = None  # type: ignore[assignment]  # transformers does without what it does not find
    sys.stdout.write(json.dumps([dataclasses.asdict(try_rendering(rendering)) for rendering in renderings]) + "\n")


if __name__ == "__main__":
    main()
