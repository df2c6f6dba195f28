"""Whether the numbers that a measure is given are ones it can work with; checked where a user's call begins."""

from numbers import Integral, Real
from typing import TYPE_CHECKING

from geomkit.errors import GeometryError

if TYPE_CHECKING:
    from torch import Tensor


def check_rank(rank: object) -> None:
    """Check that a rank is a whole number of at least 1.

    Raises:
        GeometryError: If it is not.
    """
    if not is_whole(rank, 1):
        raise GeometryError(f"expected a rank of at least 1, a whole number, found {rank!r}; give e.g. 10")


def check_confidence(confidence: object) -> None:
    """Check that a confidence is a share strictly between 0 and 1.

    Raises:
        GeometryError: If it is not, such as one in per cent.
    """
    if not isinstance(confidence, Real) or not 0 < float(confidence) < 1:
        raise GeometryError(f"expected a confidence between 0 and 1, found {confidence!r}; give .95, not 95")


def check_draws(draws: object, least: int, name: str = "draws") -> None:
    """Check that a number of random draws is whole and large enough.

    Raises:
        GeometryError: If it is not.
    """
    if not is_whole(draws, least):
        raise GeometryError(
            f"expected a whole number of at least {least}, found {name}={draws!r}; leave it out or draw more"
        )


def check_groups(groups: object) -> None:
    """Check that examples can be dealt into so many groups, or into none.

    Raises:
        GeometryError: If it is 1, negative or no whole number.
    """
    if not is_whole(groups, 0) or groups == 1:
        raise GeometryError(f"expected two groups of examples or more, or 0 for no intervals, found groups={groups!r}")


def check_finite(values: "Tensor", where: str) -> None:
    """Check that what was made of gradients is finite: one value that is not spoils all that it is compared with.

    Raises:
        GeometryError: If a value is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise GeometryError(
            f"expected finite gradients, found some that are not finite in {where}; check the model's weights and the "
            "losses of the examples"
        )


def is_whole(number: object, least: int) -> bool:
    """Say whether it is a whole number, no boolean, of at least that much.

    Example:
        >>> is_whole(2, 1), is_whole(0, 1), is_whole(2.5, 1), is_whole(True, 1)
        (True, False, False, False)
    """
    return not isinstance(number, bool) and isinstance(number, Integral) and int(number) >= least


def described(found: object) -> str:
    """Say what kind of thing it is.

    Example:
        >>> described(None), described({}), described(1), described([1])
        ('None', 'a dict', 'an int', 'a list')
    """
    if found is None:
        return "None"
    kind = type(found).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
