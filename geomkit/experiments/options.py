"""Which options an arm may have, known before hours of other arms have been run."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import Parameter, signature
from typing import Any

from geomkit.errors import DataError
from geomkit.experiments import methods, rivals
from geomkit.experiments.methods import METHODS
from geomkit.spf.method import SPF


def _keywords(function: Callable[..., Any]) -> set[str]:
    return {name for name, one in signature(function).parameters.items() if one.kind is Parameter.KEYWORD_ONLY}


_OF_THE_CELL = {"learning_rate", "steps", "batch_size", "seed", "progress"}
_OF_SPF = {one.name for one in fields(SPF)} - {"benign", "seed", "measure_curvature", "tokenizer", "log"}
_PASSED_ON: Mapping[str, set[str]] = {
    "spf": _OF_SPF,
    "scaled-sft": _OF_SPF | _keywords(methods.spf),
    "lisa": _keywords(rivals.lisa),
    "constrained-sft": _keywords(rivals.constrained_sft),
    "safe-lora": _keywords(rivals.safe_lora),
    "one-shot": _keywords(rivals.one_shot_repair),
}


def options_of(method: str) -> set[str]:
    """Return the names of the options that a method takes.

    Example:
        >>> sorted(options_of("lisa"))
        ['anchors', 'rho', 'safety_steps', 'task_steps']
    """
    return (_keywords(METHODS[method]) | _PASSED_ON.get(method, set())) - _OF_THE_CELL


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse options that would fail once the arm is run.

    Raises:
        DataError: If the method does not take one of them.
        SPFError: If there is no such rule, or it does not go with its options.
    """
    known = options_of(method)
    if unknown := sorted(set(options) - known):
        words = ", ".join(sorted(known)) or "none"
        raise DataError(f"expected options of the method '{method}' ({words}), found {', '.join(unknown)}")
    if method in {"spf", "scaled-sft"}:
        SPF("", **{name: value for name, value in options.items() if name in _OF_SPF - {"anchors"}}).checked_rule()
