"""A check of the spans that a chat template marks with ``{% generation %}``: the answers, and nothing of others."""

from collections.abc import Sequence

from geomkit.errors import DataError
from geomkit.inputs.answer_spans import turn_marks, written_span
from geomkit.inputs.messages import Conversation
from geomkit.inputs.templates import ChatTemplate
from geomkit.inputs.token_spans import Span


def check_marked_spans(template: ChatTemplate, row: Conversation, text: str, spans: Sequence[Span]) -> None:
    """Check that marked spans have every answer and nothing of the messages of others.

    What else a template marks, such as the header of the role, and an end of the turn that it leaves out, the log says
    once: templates in use do both.

    Args:
        template: The chat template.
        row: The conversation.
        text: Its rendering.
        spans: The spans of characters whose loss is taken.

    Raises:
        DataError: If an answer is not in the spans, or another message is.
    """
    if not spans:  # another error says so
        return
    marked = ["".join(text[first:end].split()) for first, end in spans]
    for index, (message, scored) in enumerate(zip(row.messages, row.scored, strict=True)):
        content = message["content"].split("</think>")[-1].strip()
        if not content or content not in text:  # nothing to find, or another check's matter
            continue
        inside = "".join(content.split()) in "".join(marked)
        if scored and not inside:
            raise DataError(
                f"expected {{% generation %}} markers around the answer {content!r:.40} of message {index}, found them "
                f"around {_shown(text, spans)}; correct the template, or {_ADVICE}"
            )
        if message["role"] != "assistant" and inside and _overlaps(template, row, text, index, content, spans):
            raise DataError(
                f"expected {{% generation %}} markers around answers only, found the {message['role']}'s message "
                f"{index}, {content!r:.40}, inside them; correct the template, or {_ADVICE}"
            )
    _tell_of_ends(template, text, spans)


_ADVICE = 'use assistant_mask="prefix" (--assistant-mask prefix)'


def _shown(text: str, spans: Sequence[Span]) -> str:
    return ", ".join(f"{text[first:end]!r:.40}" for first, end in spans[:2]) or "nothing"


def _overlaps(
    template: ChatTemplate, row: Conversation, text: str, index: int, content: str, spans: Sequence[Span]
) -> bool:
    """Return whether the place at which a template writes a message is marked: an answer may have the same words."""
    first, stop = written_span(template, row, text, index)
    exact = text[first:stop].strip() == content  # a message that is written twice has no single place
    return exact and any(max(first, start) < min(stop, end) for start, end in spans)


def _tell_of_ends(template: ChatTemplate, text: str, spans: Sequence[Span]) -> None:
    try:
        end = turn_marks(template).end
    except DataError:
        return
    if end and spans and text.startswith(end, spans[-1][1]):
        template.tell(
            f"the {{% generation %}} markers of the chat template leave out the end of the turn, {end!r}: a model is "
            "not trained to end its answers"
        )
