"""Where the assistant's answers stand in the text of a conversation, for chat templates without markers.

An answer begins where the rendering of its prompt ends, which is a prefix of the rendering of the conversation, and
ends with the template's end-of-turn token. Where a template writes a message is seen by writing a placeholder there.
"""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.inputs.messages import Conversation, Message
from geomkit.inputs.templates import PLACEHOLDER, ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?$")
_NO_PREFIX = (
    "the chat template renders the beginning of a conversation differently from the whole, so prefixes cannot tell the "
    "assistant's tokens; add {% generation %} markers to the template"
)


@dataclass(frozen=True)
class TurnMarks:
    """What a template writes around an answer.

    Attributes:
        lead: Text between the prompt and the answer, such as an empty thought.
        header: Text between the message before and the answer: the header of the role, and the lead.
        end: End of the turn after the last answer, such as ``<|im_end|>``; empty if the template writes none.
        middle_end: End of the turn after an answer that is followed by another message.
    """

    lead: str
    header: str
    end: str
    middle_end: str


def turn_marks(template: ChatTemplate) -> TurnMarks:
    """Return what a template writes around an answer, read off two short conversations.

    Raises:
        DataError: If the template refuses both, or does not write the assistant's message.
    """
    answered: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PLACEHOLDER}]
    going_on: list[Message] = [*answered, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    last, middle = template.render(_row(answered)), template.render(_row(going_on))
    if PLACEHOLDER not in last or PLACEHOLDER not in middle:
        raise DataError(
            "expected a chat template that writes the assistant's messages, found one that does not; set another "
            "tokenizer.chat_template"
        )
    tail, middle_tail = last.partition(PLACEHOLDER)[2], middle.partition(PLACEHOLDER)[2]
    end, middle_end = _ends(template.tokenizer, tail, middle_tail)
    head = last.partition(PLACEHOLDER)[0]
    prompt = template.render(_row(answered[:1]), prompt=True)
    before = template.render(_row(answered[:1]))
    lead = head[len(prompt) :] if head.startswith(prompt) else ""
    header = head[len(before) :] if head.startswith(before) else head[_shared(head, before) :]
    return TurnMarks(lead, header, end, middle_end)


def _ends(tokenizer: "PreTrainedTokenizerBase", tail: str, middle: str) -> tuple[str, str]:
    """Return the end of the last turn and of a turn in the middle, from what follows an answer at both places.

    The end is the first token of the template's own after the answer, or several that touch; the rest, such as a line
    feed or a token that ends the text, is never generated.
    """
    added = sorted((str(token) for token in tokenizer.get_added_vocab() if str(token).strip()), key=len, reverse=True)
    token = "|".join(map(re.escape, added)) or "(?!)"
    several, single = re.match(rf"\s*(?:{token})+", tail), re.match(rf"\s*(?:{token})", middle)
    if several is None:  # the end is plain text
        shared = tail[: _shared(tail, middle)].rstrip()
        return shared, shared
    end = several[0]
    if middle.startswith(end) or single is None:
        return end, end if middle.startswith(end) else ""
    return end, single[0]


def answer_spans(
    template: ChatTemplate, marks: TurnMarks, row: Conversation
) -> tuple[str, list[tuple[int, int] | None]]:
    """Return the text of a conversation, and the span of characters of each message whose loss is taken, else ``None``.

    Raises:
        DataError: If the beginning of an answer or its end cannot be told from the text.
    """
    text = template.render(row)
    last = max((index for index, message in enumerate(row.messages) if message["role"] == "assistant"), default=-1)
    spans: list[tuple[int, int] | None] = []
    before = 0
    for index, scored in enumerate(row.scored):
        if not scored:
            spans.append(None)
            continue
        if index == 0:
            raise DataError(
                "expected a message before the assistant's first, which prefixes start from, found none; drop the row"
            )
        if "tool_calls" in row.messages[index]:
            start, end = _span_of_calls(template, marks, row, text, index)
        else:
            first, stop = written_span(template, row, text, index)
            start = _start(template, marks, row, text, index, first, final=index == last)
            end = stop + len(_end_at(marks, row, text, index, stop))
        if not before <= start <= end:
            raise DataError(_NO_PREFIX)
        spans.append((start, end))
        before = end
    return text, spans


def _row(messages: list[Message], tools: list[object] | None = None) -> Conversation:
    return Conversation(messages, tools, tuple(message["role"] == "assistant" for message in messages))


def _shared(one: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def written_span(template: ChatTemplate, row: Conversation, text: str, index: int) -> tuple[int, int]:
    """Return the span of characters at which a template writes the content of a message."""
    message = row.messages[index] | {"content": PLACEHOLDER}
    other = template.render(replace(row, messages=[*row.messages[:index], message, *row.messages[index + 1 :]]))
    first = _shared(text, other)
    return first, len(text) - _shared(text[first:][::-1], other[first:][::-1])


def _start(
    template: ChatTemplate, marks: TurnMarks, row: Conversation, text: str, index: int, first: int, *, final: bool
) -> int:
    """Return where an answer begins, whose content begins at ``first``."""
    before = _row(row.messages[:index], row.tools)
    prompt = template.render(before, prompt=True)
    # Templates of models that think may begin a thought in the prompt that they leave out of the conversation, or that
    # is empty there: the line feeds of an empty thought are one token, which does not begin at the end of the prompt.
    thoughtless = _THOUGHT.sub("", prompt)
    empty = thoughtless != prompt and text[len(prompt) : len(prompt) + 1].isspace()
    for candidate in (thoughtless,) if empty else (prompt, thoughtless):
        if text.startswith(candidate):
            lead = text[len(candidate) : first]
            # A template that ignores ``add_generation_prompt`` has the header of the role behind the prompt.
            silent = lead.strip() and template.render(before) == prompt
            return first if silent or "assistant" in lead else len(candidate)
    # Some templates move the system message to the last request; the answers before it stay where they are.
    if not final and marks.header and text[:first].endswith(marks.header):
        return first - len(marks.lead)
    raise DataError(_NO_PREFIX)


def _span_of_calls(
    template: ChatTemplate, marks: TurnMarks, row: Conversation, text: str, index: int
) -> tuple[int, int]:
    """Return the span of a message that calls tools: all that follows the prompt, up to the end of the turn."""
    prompt = template.render(_row(row.messages[:index], row.tools), prompt=True)
    start = next((len(head) for head in (prompt, _THOUGHT.sub("", prompt)) if text.startswith(head)), None)
    if start is None:
        raise DataError(_NO_PREFIX)
    following = index + 1 < len(row.messages)
    limit = written_span(template, row, text, index + 1)[0] if following else len(text)
    for end in filter(None, (marks.middle_end if following else marks.end, marks.end)):
        if (place := text.find(end, start, limit)) >= 0:
            return start, place + len(end)
    # A template without an end of the turn, or with another one after calls: up to where the conversation could end.
    until = template.render(_row(row.messages[: index + 1], row.tools)).rstrip()
    if text.startswith(until) and start < len(until):
        return start, len(until)
    raise DataError("expected the end of a turn after the tool calls, found none; add {% generation %} markers")


def _end_at(marks: TurnMarks, row: Conversation, text: str, index: int, stop: int) -> str:
    """Return the end of the turn that stands behind an answer, whose content ends at ``stop``."""
    end = marks.middle_end if index + 1 < len(row.messages) else marks.end
    if text.startswith(end, stop):
        return end
    raise DataError(
        f"expected {end!r} after the answer of message {index}, found {text[stop : stop + 20]!r}; add "
        "{% generation %} markers to the template"
    )
