"""The normal form of a conversation: messages with a role and a text, tool calls, tools, and which turns are scored.

Files write the same conversation in many ways. :func:`normal_message` brings a message into one form, which a
``datasets.Dataset`` can store; :func:`conversations` reads this form back as chat templates expect it.

Tool calls and tools are stored as JSON text. Arrow, which is the memory format of ``datasets``, gives all rows the same
fields and fills fields that a row does not have with null; in a JSON text, every row keeps its own arguments.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.utils.files import parse_json

if TYPE_CHECKING:
    from datasets import Dataset

Message = dict[str, Any]
"""A message of a conversation, with a ``role`` (such as ``"user"``), a ``content`` and other fields."""

_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
"""The role under which chat templates know each role that data sets write."""

WEIGHTS = ("weight", "train", "training", "loss")
"""Fields of a message that say whether the loss is taken on it, in the order of precedence."""

_MEDIA = ("image", "images", "audio", "audios", "video", "videos")


@dataclass(frozen=True)
class Conversation:
    """A conversation as a chat template expects it.

    Attributes:
        messages: Messages with ``role``, ``content`` and, where present, ``tool_calls`` and other fields.
        tools: JSON schemas of the tools that the assistant may call; ``None`` without tools.
        scored: For each message, whether the loss is taken on it; true for messages of the assistant with weight 1.
    """

    messages: list[Message]
    tools: list[Any] | None
    scored: tuple[bool, ...]


def conversations(examples: "Dataset") -> Iterator[Conversation]:
    """Yield the conversations of examples in order.

    Raises:
        DataError: If a message is malformed.
    """
    tools = examples["tools"] if "tools" in examples.column_names else [None] * len(examples)
    for index, (messages, row_tools) in enumerate(zip(examples["messages"], tools, strict=True)):
        try:
            row = conversation(messages, row_tools)
        except DataError as error:
            raise DataError(f"example {index}: {error}") from None
        yield row


def conversation(messages: list[Message], tools: object = None) -> Conversation:
    """Return one conversation, as a chat template expects it, from its stored form.

    Raises:
        DataError: If a message is malformed.

    Example:
        >>> conversation([{"role": "user", "content": "Hi", "name": None}]).messages
        [{'role': 'user', 'content': 'Hi'}]
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"expected a non-empty list of messages, found {messages!r:.80}; fill or drop the row")
    read = [_read(normal_message(message, padded=True)) for message in messages]
    scored = tuple(message["role"] == "assistant" and message.pop("weight", 1) == 1 for message in read)
    text = normal_tools(tools, padded=True)
    return Conversation(read, None if text is None else json.loads(text), scored)


def _read(message: Message) -> Message:
    """Return a message in its normal form with the tool calls as objects."""
    return message | {"tool_calls": json.loads(message["tool_calls"])} if "tool_calls" in message else message


def normal_message(message: object, *, padded: bool = False) -> Message:
    """Return a message in its normal form: ``role``, ``content`` as one text, ``tool_calls`` as JSON, ``weight``.

    Other fields are kept, those that are null are left out.

    Args:
        message: A message with ``role`` and ``content`` or, in the form of ShareGPT, ``from`` and ``value``.
        padded: Whether nulls inside of tool calls may come from Arrow, and are removed.

    Raises:
        DataError: If the role is unknown, the content is no text, or a field has a meaning that is not supported.

    Example:
        >>> normal_message({"from": "human", "value": "Hi"})
        {'role': 'user', 'content': 'Hi'}
        >>> normal_message({"role": "user", "content": [{"type": "text", "text": "Hi"}]})
        {'role': 'user', 'content': 'Hi'}
    """
    if not isinstance(message, Mapping):
        raise DataError(f"expected messages with a text 'role' and 'content', found {message!r:.80}; write both")
    fields = {key: value for key, value in message.items() if value is not None}
    for new, old in (("role", "from"), ("content", "value")):
        if new not in fields and old in fields:
            fields = {new: fields.pop(old)} | fields if new == "role" else fields | {new: fields.pop(old)}
    name = fields.get("role")
    if not isinstance(name, str):
        raise DataError(f"expected messages with a text 'role' and 'content', found {message!r:.80}; add the role")
    role = _ROLES.get(name.lower())
    if role is None:
        raise DataError(f"expected the role system, user, assistant or tool, found {name!r:.40}; rename the role")
    for field in _MEDIA:
        if fields.pop(field, None):
            raise DataError(f"expected text only, found the field '{field}' in a message; drop the row")
    if name.lower() == "function_call":
        fields["function_call"] = fields.pop("content", None)
    _move_calls(fields, padded)
    _move_weight(fields, role)
    if "content" not in fields and "tool_calls" in fields:
        fields["content"] = ""
    if "content" not in fields and role == "assistant":
        raise DataError("expected words or tool calls in a message of the assistant, found none; drop the row")
    if "content" not in fields:
        raise DataError(f"expected messages with a text 'role' and 'content', found {message!r:.80}; add the text")
    return {"role": role, "content": _text(fields["content"])} | {
        key: value for key, value in fields.items() if key not in ("role", "content")
    }


def _text(content: object) -> str:
    """Return the text of a message, whose parts are joined as chat templates join them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(
            f"expected messages with a text 'role' and 'content', found the content {content!r:.80}; write it as a text"
        )
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = part.get("type") or "text" if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise DataError(f"expected parts of text, found the part {part!r:.80}; drop the row")
        texts.append(text)
    return "".join(texts)


def _move_calls(fields: Message, padded: bool) -> None:
    """Put the tool calls of a message into the field ``tool_calls`` as JSON, or remove the field if there are none."""
    calls, call = fields.pop("tool_calls", None), fields.pop("function_call", None)
    padded = padded and not isinstance(calls, str)  # in JSON text, a null is an argument of the call
    calls = _parsed(calls, "tool_calls")
    if call is not None:
        found = _parsed(call, "function_call")
        found = found if isinstance(found, list) else [found]
        calls = [*(calls or []), *({"type": "function", "function": function} for function in found)]
    if not calls:
        return
    if not isinstance(calls, list) or not all(isinstance(item, Mapping) for item in calls):
        raise DataError(
            f"expected 'tool_calls' to be a list of objects, found {calls!r:.80}; write e.g. "
            '[{"name": …, "arguments": …}]'
        )
    for item in calls:
        function = item.get("function") or item
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"expected a tool call with the 'name' of a function, found {item!r:.80}; add the name, or drop the row"
            )
    fields["tool_calls"] = json.dumps(_without_nulls(calls) if padded else calls, ensure_ascii=False)


def _move_weight(fields: Message, role: str) -> None:
    """Put the weight of a message into the field ``weight`` as 0 or 1, and leave a field out that says nothing."""
    weights = [fields.pop(name) for name in WEIGHTS if name in fields]
    if not weights:
        return
    if len(set(map(float, filter(_is_weight, weights)))) != 1 or not all(map(_is_weight, weights)):
        raise DataError(f"expected a weight of 0 or 1, found {weights}; the loss is taken on a message or not")
    if role == "assistant":
        fields["weight"] = int(weights[0])
    elif weights[0]:
        raise DataError(
            f"expected weights on messages of the assistant only, found {weights[0]} on role '{role}'; leave it out "
            "there"
        )


def _is_weight(value: object) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)


def normal_tools(tools: object, *, padded: bool = False) -> str | None:
    """Return the tools of a row as JSON, or ``None`` if there are none.

    Args:
        tools: A list of JSON schemas, or the same as JSON text.
        padded: Whether nulls may come from Arrow, and are removed.

    Raises:
        DataError: If the tools are not a list of objects.
    """
    parsed = _parsed(tools, "tools")
    if not parsed:
        return None
    if not isinstance(parsed, list) or not all(isinstance(tool, Mapping) for tool in parsed):
        raise DataError(
            f"expected 'tools' to be a list of JSON schemas, found {parsed!r:.80}; write one for each function, in a "
            "list"
        )
    return json.dumps(_without_nulls(parsed) if padded and not isinstance(tools, str) else parsed, ensure_ascii=False)


def _parsed(value: object, name: str) -> Any:
    """Return a value, or the object that it writes if it is JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(
            f"expected '{name}' as JSON, found {value!r:.80} ({error}); correct it, or drop the row"
        ) from None


def _without_nulls(value: Any) -> Any:
    """Return a value without the entries of objects that are null, at every depth."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
