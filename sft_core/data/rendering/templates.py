"""Chat templates rendered as transformers renders them, with the date frozen.

Invariant: a rendering is a pure function of (source, special tokens, date, kwargs, conversation). The
text is that of `tokenizer.apply_chat_template(..., tokenize=False)` on that date.
"""

from __future__ import annotations

import datetime
import functools
import json
import traceback
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

# What a template reads from the conversation itself; a kwarg of that name would have no effect.
RESERVED = ("messages", "tools", "add_generation_prompt")

# Names that data sets use for a turn's thinking, the standard one first.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# What a message says to training alone.
TRAINING_KEYS = ("train", "weight")

# What a template can raise on a conversation: its own raise_exception, an undefined name, or Python's errors.
RENDER_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip


class TemplateError(ValueError):
    """The template refused one conversation; the text is the template's own message."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with all that its output depends on, except the conversation.

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
        messages: list[dict],
        *,
        tools: list[dict] | None = None,
        kwargs: Mapping[str, Any] = {},
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; the row's `kwargs` override the recipe's.

        An empty `messages` is left to the template: the prompt before a first assistant turn is a rendering.
        Raises TemplateError when the template refuses the conversation, ValueError for a reserved kwarg.
        """
        prepared = self.prepare(messages, tools=tools, kwargs=kwargs)
        return prepared.text(len(messages), add_generation_prompt=add_generation_prompt)

    def prepare(
        self, messages: list[dict], *, tools: list[dict] | None = None, kwargs: Mapping[str, Any] = {}
    ) -> PreparedConversation:
        """The conversation ready to be rendered up to any turn. Raises as `render` does for tools and kwargs."""
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


@dataclass(frozen=True)
class PreparedConversation:
    """A conversation with the template's variables: what the texts up to each of its turns share."""

    template: jinja2.Template
    variables: dict[str, Any]
    messages: list[dict[str, Any]]

    def text(self, num_messages: int, *, add_generation_prompt: bool = False) -> str:
        """The first messages as text. Raises TemplateError when the template refuses them."""
        given = {
            **self.variables,
            "messages": self.messages[:num_messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            # A dict, not keywords: a variable named `self` must not clash with render's own argument.
            return self.template.render(given)
        except RENDER_FAILURES as error:
            raise _refusal(error) from error


@functools.lru_cache
def compile_template(source: str) -> jinja2.Template:
    """The compiled template. Raises ValueError naming the line of a syntax error."""
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}. Correct it.") from error
    template.globals = dict(template.globals)  # Jinja chains two, and copies them one by one for each rendering
    return template


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what is trained; here its body is only rendered."""

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

    # Jinja's own does each look-up in Python. Its namespaces have no public attribute but those that are set.
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
    """Jinja's sandbox, which decides by an object's type and an attribute's name: each such pair once.

    Asked anew for every look-up and call, as in Jinja, it costs most of a rendering.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._is_safe: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        asked = (type(obj), attr)
        if asked not in self._is_safe:
            self._is_safe[asked] = super().is_safe_attribute(obj, attr, value)
        return self._is_safe[asked]

    def getattr(self, obj: Any, attribute: str) -> Any:
        if self._is_safe.get((type(obj), attribute)):
            try:
                return getattr(obj, attribute)
            except AttributeError:  # an object of that type had it before
                pass
        return super().getattr(obj, attribute)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        kind = type(obj)
        if kind is jinja2.runtime.Macro:
            args = (context.eval_ctx, *args)
        elif kind is not types.BuiltinMethodType and obj is not SandboxedNamespace:
            return super().call(context, obj, *args, **kwargs)
        # These are safe whatever they are, and want nothing of the context besides.
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
    # Jinja's own filter escapes <, > and & for HTML: `<b>` in a tool's schema would train as `\u003cb\u003e`.
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
    # Arrow unifies the rows' structs by filling None: `enable_thinking: None` must not read as false.
    return {name: value for name, value in variables.items() if value is not None}


def _as_served(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as `apply_chat_template` hands it on: no None, the reasoning under both names in use."""
    message = {name: value for name, value in message.items() if value is not None and name not in TRAINING_KEYS}
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _refusal(error: Exception) -> TemplateError:
    own_message = isinstance(error, jinja2.TemplateError)
    refusal = TemplateError(str(error) if own_message else f"{type(error).__name__}: {error}")
    # A note, not part of the message: rejected rows are counted by message.
    frames = traceback.extract_tb(error.__traceback__)
    if lines := [frame.lineno for frame in frames if frame.filename == "<template>"]:
        refusal.add_note(f"chat template, line {lines[-1]}")
    return refusal
