"""The row formats of data sets: which columns a format has, and how a row becomes a conversation.

:data:`FORMATS` is the table. A format is recognised by its columns; any other columns are named by the user.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from geomkit.errors import DataError
from geomkit.inputs.files import Row
from geomkit.inputs.messages import Message, normal_message, normal_tools
from geomkit.utils.files import parse_json
from geomkit.utils.readable import is_missing

_LOGGER = logging.getLogger(__name__)

Columns = Mapping[str, str | int]
Turns = list[Message]


@dataclass(frozen=True)
class RowFormat:
    """A way in which data sets write a conversation.

    Attributes:
        name: Name of the format, for messages.
        columns: Columns that a row has, in lower case.
        convert: Makes messages of the values of these columns and of the optional columns.
        optional: Columns that a row may have, whose values are used.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Row], Turns]
    optional: tuple[str, ...] = ()


class MissingColumnsError(DataError):
    """Raised if a set does not have the columns that the user named."""


def _pair(
    prompt: str, response: str | None = None, context: Sequence[str] = (), form: str = "{prompt}\n\n{context}"
) -> Callable[[Row], Turns]:
    """Return a converter for a column of requests, one of answers, and one of a text that belongs to the request."""

    def convert(row: Row) -> Turns:
        request = _turns(row[prompt], "user", prompt)
        for column in context:
            text = row.get(column)
            if is_missing(text) or text in ([], {}):
                continue
            if not isinstance(text, str):
                raise DataError(f"expected a text in '{column}', found {text!r:.80}; write it as a text")
            if not isinstance(row[prompt], str):
                raise DataError(
                    f"expected a text in '{prompt}' beside '{column}', found messages; write the context into a "
                    f"message, and drop the column '{column}'"
                )
            request = [_message("user", form.format(prompt=row[prompt], context=text))]
        return request + (_turns(row[response], "assistant", response) if response else [])

    return convert


def _turns(value: object, role: str, column: str) -> Turns:
    """Return the messages that a cell holds: a text is one message, a list is several."""
    if isinstance(value, str):
        return [_message(role, value)]
    if isinstance(value, Mapping):
        return [dict(value)]
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        return [dict(message) for message in value]
    raise DataError(f"expected a text or messages in '{column}', found {value!r:.80}; fill or drop the row")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _listed(column: str) -> Callable[[Row], Turns]:
    """Return a converter for a column with a list of messages, or with the same as JSON."""

    def convert(row: Row) -> Turns:
        messages = row.get(column)
        if isinstance(messages, str):
            with suppress(ValueError):
                messages = parse_json(messages)
        if not isinstance(messages, list) or not messages:
            raise DataError(f"expected a non-empty list of messages, found {messages!r:.80}; fill or drop the row")
        return messages

    return convert


def _chosen(row: Row) -> Turns:
    """Return the conversation of a preference pair that ends in the answer that was preferred."""
    chosen = row["chosen"]
    request = next((row[name] for name in _REQUESTS if row.get(name)), None)
    if isinstance(chosen, str) and request is None:
        parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", chosen)
        if len(parts) < 3 or parts[0].strip():
            raise DataError(
                f"expected a prompt, or turns of Human and Assistant in 'chosen', found {chosen!r:.80}; add a column "
                "'prompt', or begin with 'Human: '"
            )
        roles = {"Human": "user", "Assistant": "assistant"}
        return [_message(roles[name], text.strip()) for name, text in zip(parts[1::2], parts[2::2], strict=True)]
    turns = _turns(chosen, "assistant", "chosen")
    if request is None or len(turns) > 1:
        return turns
    return _turns(request, "user", "prompt") + turns


_REQUESTS = ("prompt", "question", "instruction")

FORMATS = (
    RowFormat("messages", ("messages",), _listed("messages")),
    RowFormat("ShareGPT", ("conversations",), _listed("conversations")),
    RowFormat("preference pairs", ("chosen",), _chosen, (*_REQUESTS, "rejected")),
    RowFormat("Alpaca", ("instruction", "output"), _pair("instruction", "output", ["input"]), ("input",)),
    RowFormat("Dolly", ("instruction", "response"), _pair("instruction", "response", ["context"]), ("context",)),
    RowFormat("prompt and completion", ("prompt", "completion"), _pair("prompt", "completion")),
    RowFormat("prompt and response", ("prompt", "response"), _pair("prompt", "response")),
    RowFormat("question and answer", ("question", "answer"), _pair("question", "answer")),
    RowFormat("prompts", ("prompt",), _pair("prompt")),
    RowFormat("questions", ("question",), _pair("question")),
    RowFormat("instructions", ("instruction",), _pair("instruction", None, ["input"]), ("input",)),
    RowFormat("goals", ("goal",), _pair("goal"), ("behavior",)),
    RowFormat(
        "behaviours",
        ("behavior",),
        _pair("behavior", None, ["contextstring"], "{context}\n\n---\n\n{prompt}"),
        ("contextstring",),
    ),
    RowFormat("forbidden prompts", ("forbidden_prompt",), _pair("forbidden_prompt")),
)
"""The row formats, in the order in which they are listed to users."""

ROLES = ("messages", "prompt", "response", "context", "system", "history", "tools")
"""What a column can be, in ``columns={"prompt": …}``."""

_ANSWERS = ("response", "completion", "answer", "answers", "output", "solution")
_UNUSABLE = (
    "documents", "functions", "chat_template_kwargs", "image", "images", "audio", "audios", "video", "videos",
)  # fmt: skip
_ROW_WEIGHTS = ("weight", "sample_weight", "loss_weight")

KNOWN_COLUMNS = frozenset(
    {"system", "system_prompt", "history", "tools"}.union(*((*form.columns, *form.optional) for form in FORMATS))
)
"""Columns by which the header of a CSV file is recognised, in lower case."""


class RowReader:
    """Turns the rows of one data set into conversations, by a row format."""

    def __init__(self, columns: Sequence[str], name: str, named: Columns | None = None) -> None:
        """Choose the row format of a data set.

        Args:
            columns: The columns of the data set.
            name: Name of the data set, for messages.
            named: Which column is what, as ``{"prompt": "goal"}``; recognised when left out.

        Raises:
            DataError: If no format has these columns, or several have.
        """
        self._lower = {column.lower(): column for column in columns}
        self._extra: dict[str, str] = {role: role for role in ("system", "history", "tools") if role in self._lower}
        if "system_prompt" in self._lower:
            self._extra.setdefault("system", "system_prompt")
        self._others: list[RowFormat] = []
        if named is not None:
            self._format = self._by_names(named, name, columns)
        else:
            self._format = self._by_columns(name, columns)
        used = [column for column in (*self._format.columns, *self._format.optional) if column != "rejected"]
        self.consumed = [self._lower[column] for column in (*used, *self._extra.values()) if column in self._lower]
        """Columns that the conversations are made of."""

    def _by_names(self, named: Columns, name: str, columns: Sequence[str]) -> RowFormat:
        if unknown := set(named) - set(ROLES):
            raise DataError(
                f"expected columns for {', '.join(ROLES)}, found one for '{min(unknown)}'; use these names, as in "
                "columns={'prompt': …} (--columns prompt=…)"
            )
        if missing := [str(column) for column in named.values() if str(column) not in columns]:
            raise MissingColumnsError(
                f"{name}: expected a column '{missing[0]}', found {list(columns)}; name one of these columns"
            )
        lower = {role: str(column).lower() for role, column in named.items()}
        self._lower |= {str(column).lower(): str(column) for column in named.values()}
        self._extra |= {role: lower[role] for role in ("system", "history", "tools") if role in lower}
        if "messages" in lower:
            return RowFormat("messages", (lower["messages"],), _listed(lower["messages"]))
        if "prompt" not in lower:
            raise DataError('expected a column for the prompt or the messages, found none; give columns={"prompt": …}')
        context = (lower["context"],) if "context" in lower else ()
        response = lower.get("response")
        required = (lower["prompt"], *([response] if response else []))
        return RowFormat("named columns", required, _pair(lower["prompt"], response, context), context)

    def _by_columns(self, name: str, columns: Sequence[str]) -> RowFormat:
        found = {form: self._used(form) for form in FORMATS if set(form.columns) <= set(self._lower)}
        # A format whose columns all belong to another format that fits is a part of that one.
        fits = [form for form, used in found.items() if not any(used < other for other in found.values())]
        advice = 'say which column is what with columns={"prompt": …, "response": …} (--columns prompt=…,response=…)'
        if not fits:
            forms = "; ".join(" and ".join(f"'{column}'" for column in form.columns) for form in FORMATS[:8])
            raise DataError(f"{name}: expected the columns {forms}; or 'prompt' alone, found {list(columns)}; {advice}")
        chosen = fits[0]
        if chosen.name == "messages":
            self._others = fits[1:]
        elif len(fits) > 1:
            names = " or of ".join(form.name for form in fits)
            raise DataError(f"{name}: expected the columns of one format, found those of {names}; {advice}")
        if len(chosen.columns) == 1 and chosen.columns[0] not in ("messages", "conversations", "chosen"):
            if answers := [self._lower[column] for column in _ANSWERS if column in self._lower]:
                raise DataError(
                    f"{name}: expected to know the answers to '{chosen.columns[0]}', found '{answers[0]}'; {advice}"
                )
            if "target" in self._lower:
                _LOGGER.info("%s: the column 'target' is not taken as the answer; columns= can say that it is", name)
        if chosen.name == "preference pairs" and "rejected" in self._lower:
            _LOGGER.info("%s: the answers are those of 'chosen'; those of 'rejected' are not used", name)
        return chosen

    def _used(self, form: RowFormat) -> frozenset[str]:
        return frozenset(column for column in (*form.columns, *form.optional) if column in self._lower)

    def __call__(self, row: Mapping[str, Any], *, padded: bool) -> Row:
        """Return the conversation of a row in the normal form: ``messages`` and, if there are any, ``tools``.

        Args:
            row: The values of the columns.
            padded: Whether the row comes out of Arrow, which pads objects with nulls.

        Raises:
            DataError: If a value is not what its column should have.
        """
        values = {lower: row.get(column) for lower, column in self._lower.items()}
        self._check_unusable(values)
        messages = [normal_message(message, padded=padded) for message in self._format.convert(values)]
        for other in self._others:
            _check_same(other, values, messages)
        extra = {role: values.get(column) for role, column in self._extra.items()}
        messages = _with_system(extra.get("system"), [*_history(extra.get("history")), *messages])
        check_messages(messages)
        tools = normal_tools(extra.get("tools"), padded=padded)
        return {"messages": messages} | ({"tools": tools} if tools is not None else {})

    def _check_unusable(self, values: Row) -> None:
        for column in _UNUSABLE:
            if column not in self.consumed and values.get(column) not in (None, "", [], {}):
                raise DataError(f"expected no column '{column}', which cannot be used, found a value; drop the column")
        for column in _ROW_WEIGHTS:
            if column not in self.consumed and values.get(column) not in (None, 1):
                raise DataError(
                    f"expected rows that count alike, found the {column} {values[column]!r:.40}; drop the column, or "
                    "repeat or drop rows"
                )


def _history(value: object) -> Turns:
    """Return the earlier turns of a conversation, from pairs of a request and an answer, or from messages."""
    if value is None or value in ("", []):
        return []
    if isinstance(value, str):
        raise DataError(f"expected pairs of texts or messages in 'history', found {value!r:.80}; write them as a list")
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        texts: Iterable[Any] = (text for turn in value for text in turn)
        return [normal_message(_message(("user", "assistant")[index % 2], text)) for index, text in enumerate(texts)]
    return [normal_message(message) for message in _turns(value, "user", "history")]


def _with_system(value: object, messages: Turns) -> Turns:
    if value is None or (isinstance(value, str) and not value.strip()):
        return messages
    system = normal_message(_message("system", value))  # type: ignore[arg-type]
    if messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0]["content"] != system["content"]:
        raise DataError(
            f"expected one system prompt, found {messages[0]['content']!r:.40} and, in its column, {value!r:.40}; "
            "remove one of them"
        )
    return messages


def _check_same(form: RowFormat, values: Row, messages: Turns) -> None:
    """Check that columns of another format say what the messages say."""
    if all(values.get(column) is None for column in form.columns):
        return
    contents = {message["content"].strip() for message in messages}
    for turn in form.convert(values):
        if (text := normal_message(turn)["content"]).strip() not in contents:
            raise DataError(
                f"expected '{form.columns[0]}' to say what 'messages' says, found {text!r:.40}; drop one of them, or "
                'choose with columns={"messages": "messages"} (--columns messages=messages)'
            )


def check_messages(messages: Turns) -> None:
    """Check that a conversation asks something, and that its last answer has words if it has one.

    Raises:
        DataError: If there is no message, nothing is asked, or the last answer is empty.
    """
    if not messages:
        raise DataError(f"expected a non-empty list of messages, found {messages!r}; fill or drop the row")
    last = messages[-1]
    if last["role"] == "system":
        raise DataError("expected a message of the user or the assistant, found a system message only; drop the row")
    answers = [message for message in messages if message["role"] == "assistant"]
    # The end marker would still be a loss token: the model would learn silence.
    if answers and not answers[-1]["content"].strip() and "tool_calls" not in answers[-1]:
        found = answers[-1]["content"]
        raise DataError(f"expected words in the last assistant message, found {found!r:.80}; drop the row")
    if last["role"] == "user" and not last["content"].strip():
        raise DataError(f"expected words in the request, found {last['content']!r:.80}; drop the row")
