"""Checks of arguments that several measurements share, such as ranks and confidences."""

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from geomkit.errors import GeometryError
from geomkit.utils.options import OPTIONS, check_option

if TYPE_CHECKING:
    from torch import Tensor


def as_python(value: Any) -> Any:
    """Return a number of numpy or torch as Python's, which JSON and transformers take; any other value as it is.

    Example:
        >>> import numpy as np
        >>> as_python(np.int64(2)), as_python("cosine")
        (2, 'cosine')
    """
    return value.item() if getattr(value, "shape", None) == () else value


def check_rank(rank: object) -> None:
    """Check that a rank is a whole number of at least 1, and of at most a million.

    Raises:
        GeometryError: If the rank is not.
    """
    if not OPTIONS["rank"].holds(rank):
        raise GeometryError(f"expected a rank of at least 1, a whole number, found {rank!r:.40}; give e.g. 10")


def check_seed(seed: object) -> None:
    """Check that a seed is a whole number that every random generator takes.

    Raises:
        GeometryError: If the seed is negative, not whole, or 2³² or more.
    """
    check_option("seed", seed, error=GeometryError)


def check_confidence(confidence: object) -> None:
    """Check that a confidence level is a number strictly between 0 and 1.

    Raises:
        GeometryError: If the level is not, for instance because it is given in per cent.
    """
    if not isinstance(confidence, Real) or not 0 < float(confidence) < 1:
        raise GeometryError(f"expected a confidence between 0 and 1, found {confidence!r}; give .95, not 95")


def check_draws(draws: object, minimum: int, name: str = "draws") -> None:
    """Check that a number of random draws is whole and large enough.

    Args:
        draws: The number of draws.
        minimum: The smallest number allowed.
        name: Name of the argument, for the message.

    Raises:
        GeometryError: If the number is not whole, less than ``minimum``, or so large that drawing would not end.
    """
    if not is_whole(draws, minimum) or not OPTIONS["draws"].holds(draws):
        most = OPTIONS["draws"].high
        raise GeometryError(
            f"expected a whole number of at least {minimum}, found {name}={draws!r:.40}; leave it out or draw more, "
            f"up to {most:,}"
        )


def check_groups(groups: object) -> None:
    """Check a number of groups for the jackknife: 0 for no intervals, else a whole number of at least 2.

    Raises:
        GeometryError: If the number is 1, negative or not whole.
    """
    if not OPTIONS["groups"].holds(groups) or groups == 1:
        raise GeometryError(
            f"expected two groups of examples or more, or 0 for no intervals, found groups={groups!r}; give e.g. 16"
        )


def check_finite(values: "Tensor", where: str) -> None:
    """Check that values computed from gradients are finite, because a single NaN makes every sum over them NaN.

    Args:
        values: The values, of any shape.
        where: What the values belong to, for the message.

    Raises:
        GeometryError: If a value is NaN or infinite.
    """
    # The sum of finite values is finite, unless it overflows, and costs a fraction of a look at every value.
    if not (math.isfinite(float(values.sum())) or bool(values.isfinite().all())):
        raise GeometryError(
            f"expected finite gradients, found some that are not finite in {where}; check the model's weights and the "
            "losses of the examples"
        )


def is_whole(number: object, minimum: int) -> bool:
    """Return whether an object is a whole number, not a boolean, of at least ``minimum``.

    Example:
        >>> is_whole(2, 1), is_whole(0, 1), is_whole(2.5, 1), is_whole(True, 1)
        (True, False, False, False)
    """
    return not isinstance(number, bool) and isinstance(number, Integral) and int(number) >= minimum


def type_in_words(value: object) -> str:
    """Return the name of a value's type with its article, for error messages.

    Example:
        >>> type_in_words(None), type_in_words({}), type_in_words(1), type_in_words([1])
        ('None', 'a dict', 'an int', 'a list')
    """
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
