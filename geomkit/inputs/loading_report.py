"""Refusal of a checkpoint whose weights are not those of the model, by the report of transformers' loading."""

from collections.abc import Collection, Mapping
from typing import Any

from geomkit.errors import DataError

_SHOWN = 3
"""Names shown of each kind; the rest is counted."""

_COMPILED = "_orig_mod."


def refuse_wrong_weights(report: Mapping[str, Any], source: str) -> None:
    """Refuse a model with random numbers in place of weights that its checkpoint lacks, or with weights left over.

    What a checkpoint need not hold, such as a head tied to the embedding or a buffer that is computed, is not in the
    report.

    Args:
        report: ``missing_keys``, ``unexpected_keys``, ``mismatched_keys`` (name, shape in the checkpoint, shape in the
            model) and ``error_msgs``, as ``from_pretrained(output_loading_info=True)`` returns them.
        source: The checkpoint, for the message.

    Raises:
        DataError: If there is a weight of one of these kinds.

    Example:
        >>> refuse_wrong_weights({"missing_keys": {"lm_head.weight"}}, "my-model")
        Traceback (most recent call last):
        geomkit.errors.DataError: expected the weights of the model at 'my-model', found 1 missing (lm_head.weight); ...
    """
    resized = {
        name: f"{name} {_shape(saved)} for {_shape(own)}" for name, saved, own in report.get("mismatched_keys", ())
    }
    missing = set(report.get("missing_keys", ())) - set(resized)
    unexpected = set(report.get("unexpected_keys", ())) - set(resized)
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": resized.values()}
    parts = [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names]
    parts += [" ".join(str(message).split()) for message in report.get("error_msgs", ())]
    if not parts:
        return
    advice = "save the model again with save_pretrained, or copy the checkpoint again with all its files"
    if unexpected and all(_COMPILED in name for name in unexpected):
        advice = f"it was saved compiled: save model._orig_mod instead, or take '{_COMPILED}' out of the names"
    raise DataError(f"expected the weights of the model at '{source}', found {', '.join(parts)}; {advice}")


def _first(names: Collection[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _shape(shape: Collection[int]) -> str:
    return "×".join(map(str, shape))
