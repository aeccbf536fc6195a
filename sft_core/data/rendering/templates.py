"""Chat templates rendered as transformers renders them, with the date frozen.

Invariant: a rendering is a pure function of (source, special tokens, date, kwargs, conversation). It equals
`tokenizer.apply_chat_template(..., tokenize=False)` on that date.
"""

from __future__ import annotations

import datetime
import functools
import json
import traceback
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from sft_core.data.sources.formats.canonical import Message

# The conversation gives a template these variables; a kwarg of that name would have no effect.
RESERVED = ("messages", "tools", "add_generation_prompt")

# Names that data sets use for a turn's thinking, the standard name first.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# Keys of a message that only training reads.
TRAINING_KEYS = ("train", "weight")

# Errors that a template can raise on a conversation: its raise_exception, an undefined name, or Python's errors.
RENDER_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip


class TemplateError(ValueError):
    """The template refused one conversation. The text is the template's message."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with everything that its output depends on, except the conversation.

    A `kwargs` entry of None counts as not given.
    Raises ValueError when `source` does not parse, naming the line.
    """

    source: str
    special_tokens: Mapping[str, str]  # bos_token, eos_token, ...: given to the template as variables
    date: datetime.date  # what strftime_now() sees
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # the recipe's defaults for template variables

    def __post_init__(self) -> None:
        _refuse_reserved(self.kwargs)
        compile_template(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] = {},
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; the row's `kwargs` override the recipe's.

        `messages` may be empty: the prompt before a first assistant turn is a rendering, too.
        Raises TemplateError when the template refuses the conversation, ValueError for a reserved kwarg.
        """
        prepared = self.prepare(messages, tools=tools, kwargs=kwargs)
        return prepared.text(len(messages), add_generation_prompt=add_generation_prompt)

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] = {},
    ) -> PreparedConversation:
        """The conversation, ready to be rendered up to any turn. Raises as `render` does for tools and kwargs."""
        _refuse_reserved(kwargs)
        if not_dicts := [tool for tool in tools or () if not isinstance(tool, Mapping)]:
            raise TemplateError(f"tools: found {not_dicts[0]!r}; a tool is a JSON-schema dict.")
        variables = {
            "documents": None,
            "strftime_now": self.date.strftime,  # a variable hides the environment's global of that name
            **_given(self.special_tokens),
            **_given(self.kwargs),
            **_given(kwargs),
            "tools": tools,
        }
        return PreparedConversation(compile_template(self.source), variables, [_as_served(m) for m in messages])


class ServedMessage(Message, total=False):
    thinking: str  # reasoning_content under its other name


@dataclass(frozen=True)
class PreparedConversation:
    """A conversation with the template's variables: shared by the texts up to each of its turns."""

    template: jinja2.Template
    variables: Mapping[str, Any]
    messages: list[ServedMessage]

    def text(self, num_messages: int, *, add_generation_prompt: bool = False) -> str:
        """The first `num_messages` as text. Raises TemplateError when the template refuses them."""
        variables = {
            **self.variables,
            "messages": self.messages[:num_messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            # A dict, not keywords: a variable named `self` must not clash with render's own argument.
            return self.template.render(variables)
        except RENDER_FAILURES as error:
            raise _refusal(error) from error


@functools.lru_cache
def compile_template(source: str) -> jinja2.Template:
    """The compiled template. Raises ValueError naming the line of a syntax error."""
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}. Correct it.") from error
    template.globals = dict(template.globals)  # Jinja has a chain of two, which it copies key by key for each rendering
    return template


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what other trainers train; here only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it on the instance)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope, as in transformers: a `set` inside the tag must stay invisible after it.
        return jinja2.nodes.Scope(body).set_lineno(line)


class SandboxedNamespace(jinja2.utils.Namespace):
    """`namespace()` that refuses names with a leading underscore, as transformers does."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        super().__init__(attributes)

    # Jinja's method does each look-up in Python. It is not needed: a namespace has no other public attributes.
    __getattribute__ = object.__getattribute__

    def __getattr__(self, name: str) -> Any:
        try:
            return self._Namespace__attrs[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class SandboxedDict:
    """`dict(...)` and `dict.fromkeys(...)` for templates, without the type behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which decides once for each pair of an object's type and an attribute's name.

    Jinja decides anew at every look-up and call, which costs most of a rendering.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._is_safe: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        pair = (type(obj), attr)
        if pair not in self._is_safe:
            self._is_safe[pair] = super().is_safe_attribute(obj, attr, value)
        return self._is_safe[pair]

    def getattr(self, obj: Any, attribute: str) -> Any:
        if self._is_safe.get((type(obj), attribute)):
            try:
                return getattr(obj, attribute)
            except AttributeError:  # another object of that type has it
                pass
        return super().getattr(obj, attribute)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        kind = type(obj)
        if kind is jinja2.runtime.Macro:
            args = (context.eval_ctx, *args)
        elif kind is not types.BuiltinMethodType and obj is not SandboxedNamespace:
            return super().call(context, obj, *args, **kwargs)
        # Macros, built-in methods and namespaces are safe, and need nothing else of the context.
        for name in ("_block_vars", "_loop_vars"):
            kwargs.pop(name, None)
        return obj(*args, **kwargs)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment of transformers/utils/chat_template_utils.py, `_compile_jinja_template` (5.23)."""
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "dict": SandboxedDict(),
        "namespace": SandboxedNamespace,
    }
    return environment


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's filter escapes <, > and & for HTML: `<b>` in a tool's schema would train as `\u003cb\u003e`.
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}: a name starts with a letter.")


def _refuse_reserved(kwargs: Mapping[str, Any]) -> None:
    for name in RESERVED:
        if kwargs.get(name) is not None:
            raise ValueError(f"chat template kwarg {name!r}: the conversation gives it. Remove the kwarg.")


def _given(variables: Mapping[str, Any]) -> dict[str, Any]:
    # Arrow fills the keys that a row lacks with None: `enable_thinking: None` must not read as false.
    return {name: value for name, value in variables.items() if value is not None}


def _as_served(message: Mapping[str, Any]) -> ServedMessage:
    """The message as `apply_chat_template` passes it on: without None, its reasoning under both names in use."""
    message = {name: value for name, value in message.items() if value is not None and name not in TRAINING_KEYS}
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return cast(ServedMessage, message)


def _refusal(error: Exception) -> TemplateError:
    is_of_template = isinstance(error, jinja2.TemplateError)
    refusal = TemplateError(str(error) if is_of_template else f"{type(error).__name__}: {error}")
    # Keep the line out of the message, so that equal refusals have equal messages.
    frames = traceback.extract_tb(error.__traceback__)
    if lines := [frame.lineno for frame in frames if frame.filename == "<template>"]:
        refusal.add_note(f"chat template, line {lines[-1]}")
    return refusal
