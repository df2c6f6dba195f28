"""Rendering of conversations with a chat template, with a check that the template leaves nothing out.

Every rendering of geomkit, for training and for generation, goes through :class:`ChatTemplate`, so that a model is
trained on the texts that it is asked with.
"""

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.inputs.messages import Conversation, Message
from geomkit.utils.files import parse_json
from geomkit.utils.locks import ThreadLock
from geomkit.utils.watchdog import Watchdog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

PINNED_DATE = datetime(2024, 7, 26)  # noqa: DTZ001
"""The date that chat templates write instead of today's, so that a run can be resumed on another day."""

PLACEHOLDER = "\ue000x\ue001"
"""A text that no conversation has, to see where a template writes a message."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CLOSED_THOUGHT = "</think>"

# The extension of jinja by which transformers tracks the markers is one object for all threads.
_LOCK = ThreadLock()

_WATCHDOG = Watchdog()

SECONDS = 20
"""Longest time that a template may take for a conversation."""

CHARACTERS = 10_000_000
"""Longest text that a template may write."""

_TOLD: set[tuple[str, str]] = set()


class TemplateLimitError(DataError):
    """Raised for a chat template that does not end, or writes without end."""

    def __init__(self, found: str) -> None:
        """Make the message of what the template does instead of ending."""
        super().__init__(f"expected a chat template that ends, found one that {found}; take another template")


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Take the template of a tokenizer.

        Raises:
            DataError: If the tokenizer has no chat template, or the template writes the time in a way that cannot be
                pinned.
        """
        if tokenizer is None:
            raise DataError("expected the model's tokenizer, found None; give it, as load_model returns it")
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"expected a tokenizer with a chat template, found none on '{tokenizer.name_or_path}'; "
                "use an instruction-tuned model or set tokenizer.chat_template"
            )
        self.tokenizer = tokenizer

    def source(self, tools: "Sequence[Any] | None" = None) -> str:
        """Return the template for conversations with these tools, in which calls of the clock are replaced by a date.

        Raises:
            DataError: If the template computes the format of the date.
        """
        try:
            template = self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # several templates, and none is the default
            raise DataError(
                f"expected a default chat template, found {' '.join(str(error).split()):.200}; set "
                "tokenizer.chat_template to one of them"
            ) from None
        return _pinned(template)

    def has_markers(self, tools: "Sequence[Any] | None" = None) -> bool:
        """Return whether the template marks the assistant's words with ``{% generation %}``."""
        return bool(_GENERATION_MARK.search(self.source(tools)))

    def render(self, row: Conversation, *, prompt: bool = False) -> str:
        """Return the text of a conversation; of its prompt, which ends where the assistant is to begin, if asked.

        Raises:
            DataError: If the template refuses the conversation.
        """
        return self._rendered(row, prompt=prompt, markers=False)[0]

    def render_marked(self, row: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and the spans of characters between the markers of the template.

        Raises:
            DataError: If the template refuses the conversation.
        """
        return self._rendered(row, prompt=False, markers=True)

    def _rendered(self, row: Conversation, *, prompt: bool, markers: bool) -> tuple[str, list[tuple[int, int]]]:
        messages = _with_arguments(row.messages, parse_json)
        if self._takes_parts:
            messages = _with_parts(messages)
        try:
            return self._jinja(messages, row.tools, prompt, markers)
        except TemplateLimitError:
            raise
        except Exception as error:  # a template may raise anything: jinja's errors, TypeError, KeyError, …
            # Some templates write the arguments of a call as they are, and need text.
            texts = _with_arguments(messages, None)
            if texts != messages:
                try:
                    return self._jinja(texts, row.tools, prompt, markers)
                except TemplateLimitError:
                    raise
                except Exception:  # noqa: S110 - the first error is the one to report
                    pass
            raise DataError(_refusal(error)) from None

    def _jinja(
        self, messages: list[Message], tools: "Sequence[Any] | None", prompt: bool, markers: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _LOCK.held(), _WATCHDOG.limit(SECONDS):
                texts, spans = render_jinja_template(
                    conversations=[messages],
                    tools=tools,
                    chat_template=self.source(tools),
                    return_assistant_tokens_mask=markers,
                    add_generation_prompt=prompt,
                    **self.tokenizer.special_tokens_map,
                )
        except TimeoutError:
            raise TemplateLimitError(f"is still at work after {SECONDS} seconds, as one that loops") from None
        except MemoryError:
            raise TemplateLimitError("writes more than fits into memory") from None
        if len(texts[0]) > CHARACTERS:
            raise TemplateLimitError(f"writes {len(texts[0]):,} characters, more than {CHARACTERS:,}")
        return texts[0], list(spans[0]) if markers else []

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads lists of parts only, as those of models for images and text do."""
        plain = [{"role": "user", "content": PLACEHOLDER}]
        return not self._shows(plain) and self._shows(_with_parts(plain))

    def _shows(self, messages: list[Message]) -> bool:
        try:
            return PLACEHOLDER in self._jinja(messages, None, False, False)[0]
        except TemplateLimitError:
            raise
        except Exception:  # a template may raise anything
            return False

    def check(self, row: Conversation, text: str, *, prompt: bool = False) -> None:
        """Check that the text of a conversation has every message, tool, tool call and thought of it.

        What only the earlier turns of the assistant thought is left out by many templates on purpose; the log says so
        once.

        Args:
            row: The conversation.
            text: Its rendering.
            prompt: Whether the rendering is that of a prompt.

        Raises:
            DataError: If the template leaves something out.
        """
        if row.tools and self._same_without(row, text, prompt, tools=None):
            raise DataError("the chat template does not write the tools of this conversation; drop them or the row")
        last = max((index for index, scored in enumerate(row.scored) if scored), default=-1)
        for index, message in enumerate(row.messages):
            self._check_message(row, text, prompt, index, message, final=index == last)
        if _DATE.search(self.tokenizer.get_chat_template(tools=row.tools)):
            self._tell_date()
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos * 2):
            self.tell(f"the chat template writes the token {bos} twice at the beginning of a conversation")

    def _check_message(
        self, row: Conversation, text: str, prompt: bool, index: int, message: Message, *, final: bool
    ) -> None:
        where = f"message {index} ({message['role']})"
        content = message["content"].strip()
        if content not in text:
            if self._same_without(row, text, prompt, index, content=PLACEHOLDER):
                raise DataError(f"the chat template does not write {where}; drop the row or change the role")
            if _CLOSED_THOUGHT in content:
                self._check_thought(content.split(_CLOSED_THOUGHT)[0].split("<think>")[-1], text, where, final=final)
        if "tool_calls" in message and self._same_without(row, text, prompt, index, tool_calls=None):
            raise DataError(f"the chat template does not write the tool calls of {where}; drop the row")
        for field in _REASONING:
            if isinstance(message.get(field), str):
                self._check_thought(message[field], text, where, final=final)
        name = message.get("name")  # templates leave the name of a tool out, because the call has it
        if isinstance(name, str) and message["role"] != "tool" and name not in text:
            raise DataError(f"the chat template does not write the name '{name:.40}' of {where}; drop the field")

    def _check_thought(self, thought: str, text: str, where: str, *, final: bool) -> None:
        if "".join(thought.split()) in "".join(text.split()):
            return
        if final:
            raise DataError(
                f"the chat template leaves out what the assistant thinks in {where}, so it would not be learnt; remove "
                "the thinking from the row, or take a template that writes it"
            )
        self.tell("the chat template leaves out what the assistant thought in earlier turns")

    def _same_without(
        self, row: Conversation, text: str, prompt: bool, index: int | None = None, **fields: Any
    ) -> bool:
        """Return whether the rendering stays the same with other values of fields; ``None`` takes a field out."""
        if index is None:
            changed = replace(row, **fields)
        else:
            message = {key: value for key, value in (row.messages[index] | fields).items() if value is not None}
            changed = replace(row, messages=[*row.messages[:index], message, *row.messages[index + 1 :]])
        try:
            return self.render(changed, prompt=prompt) == text
        except TemplateLimitError:
            raise
        except DataError:  # a template that refuses the change has read the field
            return False

    def _tell_date(self) -> None:
        date = f"{PINNED_DATE:%d %B %Y}"
        self.tell(
            f"the chat template writes today's date; geomkit writes {date} in its place, so that a run can be resumed "
            "on another day"
        )

    def tell(self, message: str) -> None:
        """Log a message, once in a process for this template."""
        key = (str(self.tokenizer.chat_template), message)
        if key not in _TOLD:
            _TOLD.add(key)
            _LOGGER.info("%s", message)


@lru_cache
def _pinned(source: str) -> str:
    """Return a template with a date in place of each call of the clock."""
    pinned = _DATE.sub(lambda call: json.dumps(PINNED_DATE.strftime(call[2])), source)
    if re.search(r"strftime_now\s*\(", pinned):
        raise DataError(
            "expected a chat template whose output does not depend on the clock, found a call of strftime_now with a "
            "computed format; write a date into tokenizer.chat_template"
        )
    return pinned


def _with_arguments(messages: list[Message], parse: Callable[[str], Any] | None) -> list[Message]:
    """Return messages with the arguments of tool calls as objects (with ``parse``) or as JSON text (without)."""
    return [
        message | {"tool_calls": [_with_argument(call, parse) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_argument(call: Message, parse: Callable[[str], Any] | None) -> Message:
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_argument(call["function"], parse)}
    arguments = call.get("arguments")
    if parse and isinstance(arguments, str):
        try:
            return call | {"arguments": parse(arguments)}
        except ValueError:
            return call
    if parse is None and arguments is not None and not isinstance(arguments, str):
        return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    return call


def _with_parts(messages: list[Message]) -> list[Message]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _refusal(error: Exception) -> str:
    """Return in one line why a template did not render a conversation."""
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

    if isinstance(error, DataError):
        return str(error)
    reason = " ".join(str(error).split())
    if isinstance(error, TemplateSyntaxError):
        return (
            f"expected a chat template in the language of jinja, found an error in its line {error.lineno}: {reason}; "
            "correct tokenizer.chat_template"
        )
    if isinstance(error, TemplateError) and not isinstance(error, UndefinedError):
        return f"the chat template refuses this conversation: {reason}; change or drop this conversation"
    return (
        f"the chat template fails on this conversation: {type(error).__name__}: {reason}; drop this conversation, or "
        "set another tokenizer.chat_template"
    )
