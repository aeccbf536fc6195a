"""The mask proof: every tokenized row is compared with the messages that it came from. A difference ends the build.

The proof uses the conversation, the ids read back, and the prompt as a server makes it; it shares no code with the
module that finds the spans. Of every row it checks:

- the ids decode to its text, and typed text is no control token;
- the trained parts are turns up to their stop tokens, and each has the texts of its message (thinking by policy);
- a turn comes after the messages before its own, and is trained from the end of its served prompt;
- over a conversation's rows, each turn that is to be trained is trained once, with its weight.

A turn that equals no known form filled with its texts (see forms.py) is proved: its prompt is rendered anew. For a turn
of a new shape, and for one conversation in 128, the prompt is tokenized as well: the row begins with its ids.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_core.data.proof.decoded import MARK, DecodedRows, Piece, Turn, Vocabulary
from sft_core.data.proof.forms import Forms, Texts
from sft_core.data.proof.serving import Server
from sft_core.data.proof.talk import Talk, spoken, thinking
from sft_core.data.rendering.policy import RowPolicy
from sft_core.data.rendering.templates import ChatTemplate, TemplateError
from sft_core.data.shards.token_shards import TokenRow
from sft_core.data.sources.formats.canonical import Conversation, Message
from sft_core.data.sources.formats.tools import is_written, leaves

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sft_core.data.tokenizer.encoded import EncodedRows

_AUDITED = 128  # one conversation in as many is proved in full, whatever its forms
_EXCERPT = 1500  # bytes of a row to show on either side of a fault
_QUOTED = 60  # characters of a row in a message


class MaskProofFailed(ValueError):
    """A row trains other text than its conversation has. `pieces`: the row around the fault, to be shown."""

    def __init__(self, fault: str, pieces: list[Piece]):
        shown = "".join(f"⟦{piece.text}⟧" if piece.is_trained else piece.text for piece in pieces)
        super().__init__(f"{fault}\nthe row, with what is trained in ⟦ ⟧:\n{shown.replace('⟧⟦', '')}")
        self.fault, self.pieces = fault, pieces

    def __reduce__(self) -> Any:  # a worker process pickles it
        return type(self), (self.fault, self.pieces)


class _Fault(Exception):
    def __init__(self, message: str, at: int):
        super().__init__(message)
        self.at = at  # a byte of the row


@dataclasses.dataclass
class _Row:
    """A row, read back."""

    data: bytes
    tokens: TokenRow
    turns: list[Turn]
    weights: list[float]
    is_normalized: bool = False  # whether the tokenizer changed its text to a normal form


class MaskProof:
    """Checks the rows of one source, a row group at a time."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: ChatTemplate,
        stop_tokens: tuple[str, ...],
        policy: RowPolicy,
    ):
        self._policy, self._encoder = policy, tokenizer.backend_tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._server = Server(self._vocabulary, template, policy)
        self._stop = self._vocabulary.marked(stop_tokens[0])
        self._stop_ids = np.array(tokenizer.convert_tokens_to_ids(list(stop_tokens)), dtype=np.int32)
        self._forms, self._num_prompts = Forms(), 0

    def check(
        self, conversations: list[Conversation], rows: dict[str, list[Any]], encoded: EncodedRows
    ) -> dict[str, int]:
        """Counts of checked rows, turns, prompts and forms. Raises MaskProofFailed.

        rows: the rendered rows by column; the column `conversation` has numbers of `conversations`.
        """
        # Reset for each row group, so that counts do not depend on which process got which group.
        self._forms, self._num_prompts = Forms(), 0
        assert len(encoded) == len(rows["conversation"]), "a row without its conversation would not be checked"
        decoded = DecodedRows(self._vocabulary, encoded)
        turns = decoded.turns(self._stop_ids)
        members: dict[int, list[int]] = {}
        for row, conversation in enumerate(rows["conversation"]):
            members.setdefault(conversation, []).append(row)
        num_turns = 0
        for place, (number, member_rows) in enumerate(members.items()):
            talk = Talk(conversations[number], self._policy)
            num_turns += len(talk.waiting)
            row = member_rows[0]
            try:
                for row in member_rows:
                    read = _Row(decoded.row(row), encoded[row], turns[row], rows["weights"][row])
                    self._check_row(talk, read, rows["text"][row], is_audited=place % _AUDITED == 0)
                untrained = f"messages {talk.waiting} are to be trained and no row trains them"
                _check(not talk.waiting, untrained, len(read.data))
            except _Fault as fault:
                message = f"mask proof: conversation {rows['row_id'][row]}: {fault}"
                raise MaskProofFailed(
                    message, decoded.pieces(row, (fault.at - _EXCERPT, fault.at + _EXCERPT))
                ) from None
        return {
            "rows": len(encoded),
            "turns": num_turns,
            "prompts": self._num_prompts,
            "forms": self._forms.num_learned,
        }

    def _check_row(self, talk: Talk, row: _Row, text: str, *, is_audited: bool) -> None:
        plain = row.data.replace(MARK, b"")
        if plain != text.encode():
            row.is_normalized = True
            actual, expected = (self._said(side, row) for side in (plain.decode("utf-8", "replace"), text))
            _check_same(actual.encode(), expected.encode(), "the ids decode to another text")
        if talk.is_trained_whole:
            self._check_whole(talk, row)
        else:
            self._check_turns(talk, row, is_audited=is_audited)

    def _check_whole(self, talk: Talk, row: _Row) -> None:
        masked = int(np.argmin(row.tokens.trained))
        _check(bool(row.tokens.trained[masked]), f"loss_scope all trains every token, and not token {masked}", 0)
        if "text" in talk.conversation:
            expected = self._said(talk.conversation["text"], row).encode() + self._stop
            _check_same(row.data, expected, "the row is not its text and a stop token")
            return
        shape, texts = talk.shape(-1, len(talk.messages)), self._normal(talk.segment(-1, len(talk.messages)), row)
        if not self._forms.fit(shape, row.data, b"", texts):
            self._num_prompts += 1
            expected = _rendered(self._server.whole, talk.conversation, normalize=row.is_normalized)
            _check_same(row.data, expected, "the row is not what the template writes")
            self._forms.learn(shape, expected, b"", texts, is_first=False)

    def _check_turns(self, talk: Talk, row: _Row, *, is_audited: bool) -> None:
        _check(bool(row.turns), "nothing of it is trained", 0)
        trained, position = [-1], 0  # messages
        for turn in row.turns:
            _check(turn.is_stopped, "what is trained does not end with a stop token", turn.end)
            index = self._message(talk, row, trained[-1], position, turn)
            talk.waiting.remove(index)
            trained.append(index)
            position = turn.end
        _check(self._vocabulary.is_blank(row.data[position:]), "text follows the last turn that it trains", position)
        _check_weights([talk.messages[index] for index in trained[1:]], row)
        if is_audited:
            self._prove(talk, trained[-1], row, row.turns[-1], with_ids=True)

    def _message(self, talk: Talk, row: _Row, last: int, position: int, turn: Turn) -> int:
        """The message that a turn trains. last: the row's trained message before it. Raises _Fault if none fits."""
        history, said = row.data[position : turn.start], row.data[turn.start : turn.stop]
        ahead = [index for index in talk.waiting if index > last]
        for index in ahead:
            if self._forms.fit(talk.shape(last, index), history, said, self._normal(talk.segment(last, index), row)):
                return index
        faults = []
        for index in ahead:
            if self._around(talk, index, said, row) is None:
                continue
            shape = talk.shape(last, index)
            try:
                self._prove(talk, index, row, turn, with_ids=shape not in self._forms)
            except _Fault as fault:
                faults.append(fault)
                continue
            texts = self._normal(talk.segment(last, index), row)
            self._forms.learn(shape, history, said, texts, is_first=last < 0)
            return index
        raise faults[0] if faults else _Fault(self._unsaid(talk, last, said, row), turn.start)

    def _prove(self, talk: Talk, index: int, row: _Row, turn: Turn, *, with_ids: bool) -> None:
        """Compares a turn with its prompt as a server makes it."""
        self._num_prompts += 1
        name = f"messages[{index}]"
        served = _rendered(self._server.at_turn, talk.conversation, index, normalize=row.is_normalized)
        prompt, rendering = served.prompt, served.rendering
        _check_same(row.data[: len(prompt)], prompt, f"the row does not begin with the served prompt of {name}")
        inside = f"what is trained stands inside of the served prompt of {name}"
        _check(turn.stop >= len(prompt), inside, turn.start)
        start = self._server.trained_from(prompt, row.data[len(prompt) : turn.stop])
        fault = f"{name} is trained from {_quoted(row.data[turn.start :])}, not from {_quoted(row.data[start:])}"
        _check(turn.start == start, fault, turn.start)
        if rendering.startswith(prompt):
            _check_same(row.data[: turn.stop], rendering[: turn.stop], f"{name} is not what the template writes")
            rest = rendering[turn.stop :]
            _check(self._vocabulary.is_blank(rest), f"{name} goes on after its stop token: {_quoted(rest)}", turn.end)
        else:  # The rendered and the served turn differ, but agree after an opened think block.
            said, closed = _text(row.data[len(prompt) : turn.end]), ""
            if self._server.opens_thinking(prompt):
                closed = _text(self._vocabulary.marked("</think>"))
                said = said.lstrip().removeprefix(self._said(thinking(talk.messages[index], self._policy), row).strip())
                said = said.lstrip()
            is_shown = _text(rendering).rstrip().endswith(said.removeprefix(closed).strip())
            fault = f"{name} is trained with {_quoted(row.data[turn.start :])}, which the template does not write"
            _check(said.startswith(closed) and is_shown, fault, turn.start)
        if with_ids and served.is_as_typed:
            self._check_ids(name, row, turn, prompt)

    def _check_ids(self, name: str, row: _Row, turn: Turn, prompt: bytes) -> None:
        ids = row.tokens.input_ids
        if self._policy.served_prefix == "tokens":
            expected = self._ids(prompt)
            _check(ids[: len(expected)].tolist() == expected, f"the served prompt of {name} has other ids", 0)
        expected = self._ids(row.data[max(turn.start, len(prompt)) : turn.end])
        actual = ids[turn.last - len(expected) : turn.last].tolist()
        _check(actual == expected, f"{name} has other ids than its text by itself", turn.start)

    def _ids(self, data: bytes) -> list[int]:
        (encoding,) = self._encoder.encode_batch_fast([data.replace(MARK, b"").decode()], add_special_tokens=False)
        return encoding.ids

    def _around(self, talk: Talk, index: int, said: bytes, row: _Row) -> list[str] | None:
        """The turn's text around the message's texts; None when one is missing or the order differs."""
        text, message = _text(said), talk.messages[index]
        around, position = [], 0
        for part in spoken(message, self._policy):
            part = self._said(part, row).strip()
            start = text.find(part, position)
            if start < 0:
                return None
            around.append(text[position:start])
            position = start + len(part)
        around.append(text[position:])
        written = "".join(around)
        values = (value for call in message.get("tool_calls", ()) for value in leaves(call["function"]))
        return around if all(is_written(value, written) for value in values) else None

    def _unsaid(self, talk: Talk, last: int, said: bytes, row: _Row) -> str:
        """The fault of a trained turn that is none of the turns that may follow."""
        for index in sorted(range(len(talk.messages)), key=lambda index: -len("".join(talk.texts[index]))):
            name = f"messages[{index}], of the {talk.messages[index]['role']},"
            if self._around(talk, index, said, row) is not None:
                if index in talk.waiting:
                    return f"{name} is trained after messages[{last}]"
                return f"{name} is trained {'again' if index in talk.to_train else 'and must not be'}"
            if index in talk.waiting and self._around(talk, index, said.replace(MARK, b""), row) is not None:
                return f"{name} has a control token where that is typed as text"
        return f"a trained turn says what no message says: {_quoted(said)}"

    def _said(self, text: str, row: _Row) -> str:
        return self._vocabulary.normalized(text) if row.is_normalized else text

    def _normal(self, texts: Texts, row: _Row) -> Texts:
        if not row.is_normalized:
            return texts
        history, said = ([self._said(text, row) for text in part] for part in (texts.history, texts.said))
        return Texts(history, texts.roles, said)


def _check_weights(trained: list[Message], row: _Row) -> None:
    expected = [float(message.get("weight", 1.0)) for message in trained]
    if not row.weights and all(weight == 1 for weight in expected):
        return
    # Training reads a weight for each run of trained tokens: two turns must not be one run.
    num_runs = len(row.turns) - sum(turn.last == other.first for turn, other in itertools.pairwise(row.turns))
    _check(
        num_runs == len(row.weights) == len(expected) and bool(np.allclose(row.weights, expected)),
        f"the turns' weights are {expected}; the row has {row.weights} for {num_runs} trained parts",
        row.turns[0].start,
    )


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _rendered(render: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return render(*args, **options)
    except TemplateError as error:
        raise _Fault(f"the template refuses the conversation: {error}", 0) from None


def _check(holds: bool, fault: str, at: int) -> None:
    if not holds:
        raise _Fault(fault, at)


def _check_same(actual: bytes, expected: bytes, fault: str) -> None:
    if actual != expected:
        pairs = enumerate(zip(actual, expected, strict=False))
        at = next((place for place, (byte, other) in pairs if byte != other), min(len(actual), len(expected)))
        raise _Fault(f"{fault}: it has {_quoted(actual[at:])} where {_quoted(expected[at:])} is expected", at)


def _quoted(data: bytes) -> str:
    """The beginning of a part of a row, for a message; it says whether that is a control token."""
    if not data:
        return "its end"
    kind = "the control token in " if data.startswith(MARK) else ""
    return kind + repr(data[: 4 * _QUOTED].replace(MARK, b"").decode("utf-8", "replace")[:_QUOTED])
