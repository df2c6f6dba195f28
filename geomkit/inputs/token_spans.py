"""From spans of characters to tokens: the mask of the tokens that a span consists of, with a check of their text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from geomkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


def mask_of_spans(
    tokenizer: "PreTrainedTokenizerBase", text: str, spans: Sequence[Span]
) -> tuple[list[int], list[bool]]:
    """Return the (T,) token ids of a text, and the (T,) mask of the tokens that begin inside one of the spans.

    A token that joins the space before a span to the first word of the span belongs to it. A special token that
    swallows the space behind it (``rstrip``) begins before the span and does not.

    The mask of ``tokenizer.apply_chat_template`` is wrong if the tokenizer drops the last character between two
    markers, such as a space: it then marks all tokens up to the end of the conversation, including those of the user.

    Raises:
        DataError: If the tokenizer is not fast and the tokens before a span depend on what follows.
    """
    if not tokenizer.is_fast:
        return _mask_by_prefixes(tokenizer, text, spans)
    rendered = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [False] * len(rendered["input_ids"])
    for first, end in spans:
        offsets = enumerate(rendered["offset_mapping"])
        inside = [token for token, (low, high) in offsets if _belongs(text, low, high, first, end)]
        if inside:
            mask[inside[0] : inside[-1] + 1] = [True] * (inside[-1] + 1 - inside[0])
    return list(rendered["input_ids"]), mask


def _belongs(text: str, low: int, high: int, first: int, end: int) -> bool:
    """Return whether a token of the characters ``low`` to ``high`` belongs to the span ``first`` to ``end``."""
    if low >= end or high <= first:
        return False
    return low >= first or (text[low:first].isspace() and not text[first:high].isspace())


def _mask_by_prefixes(
    tokenizer: "PreTrainedTokenizerBase", text: str, spans: Sequence[Span]
) -> tuple[list[int], list[bool]]:
    """Return the same for a tokenizer that does not know where its tokens stand."""
    ids = _ids(tokenizer, text)
    mask = [False] * len(ids)
    for first, end in spans:
        head, whole = _ids(tokenizer, text[:first]), _ids(tokenizer, text[:end])
        if ids[: len(head)] != head or ids[: len(whole)] != whole:
            raise DataError(_no_prefix(text, first))
        mask[len(head) : len(whole)] = [True] * (len(whole) - len(head))
    return ids, mask


def check_spans(
    tokenizer: "PreTrainedTokenizerBase", text: str, spans: Sequence[Span], ids: Sequence[int], mask: Sequence[bool]
) -> None:
    """Check that the tokens before each span are those of the text before it, and that the span's tokens spell it.

    Raises:
        DataError: If the model would be trained behind other tokens than those of the prompt, or on another text.
    """
    scored, position = [], 0
    for first, _ in spans:
        start = next((token for token in range(position, len(mask)) if mask[token]), len(mask))
        head = _ids(tokenizer, text[:first])
        # White space at the beginning of an answer may join that at the end of the prompt, and is then not scored.
        joined = text[first : first + 1].isspace() and list(ids[: len(head) - 1]) == head[:-1]
        if list(ids[:start]) != head and not joined:
            raise DataError(_no_prefix(text, first))
        position = next((token for token in range(start, len(mask)) if not mask[token]), len(mask))
        scored.append(list(ids[start:position]))
    for (first, end), tokens in zip(spans, scored, strict=True):
        expected, found = tokenizer.decode(_ids(tokenizer, text[first:end])), tokenizer.decode(tokens)
        if "".join(found.split()) != "".join(expected.split()):
            raise DataError(
                f"expected tokens that spell the answer {expected!r:.60}, found {found!r:.60}; add "
                "{% generation %} markers to the template"
            )


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids)


def _no_prefix(text: str, first: int) -> str:
    return (
        f"the tokenizer joins the end of the prompt {text[max(0, first - 20) : first]!r} to the answer "
        f"{text[first : first + 20]!r}, so the prompt's tokens are no prefix; drop the row, or take the space at the "
        "border out of the template"
    )
