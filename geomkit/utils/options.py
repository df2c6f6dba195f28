"""The numeric options of the command line, of grids and of functions: what each takes, in one table.

A number beyond its range would fail late and without a word on the option, run for ever, or be taken silently for
something else: ``batch_size=0``, ``seed=2**70``, a learning rate that is NaN, a million threads.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType

from geomkit.errors import DataError, GeomkitError


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes.

    Attributes:
        low: The smallest number.
        high: The largest number.
        whole: Whether the number is whole.
        open: Whether ``low`` itself is excluded.
    """

    low: float
    high: float
    whole: bool = True
    open: bool = False

    def holds(self, value: object) -> bool:
        """Return whether a value is a number of this range; booleans and NaN are none.

        Example:
            >>> [Range(1, 9).holds(value) for value in (1, 9, 0, 2.5, True, "1")]
            [True, True, False, False, False, False]
        """
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        # Numbers of numpy become Python's, whose comparisons do not overflow.
        try:
            number = int(value) if isinstance(value, Integral) else float(value)
        except OverflowError:  # a fraction of huge numbers
            return False
        return self.low <= number <= self.high and not (self.open and number == self.low)

    def __str__(self) -> str:
        """Return the range in words."""
        kind = "a whole number" if self.whole else "a number" if self.high == math.inf else "a finite number"
        if self.low <= -_HUGE:
            return kind
        most = f" to {self.high:,.0f}" if self.high < _HUGE else ""
        return f"{kind} {'above' if self.open else 'from'} {self.low:,.0f}{most}"


_HUGE = 1e300


_SIZE = Range(1, 10**9)
_COUNT = Range(0, 10**9)
_SHARE = Range(0, 1, whole=False, open=True)
_AMOUNT = Range(0, _HUGE, whole=False)
_OR_NO_LIMIT = math.inf  # the largest number of an option for which infinity stands for no limit
_POSITIVE = Range(0, _HUGE, whole=False, open=True)
_SEED = Range(0, 2**32 - 1)  # numpy's global generator, which transformers seeds, takes no larger seed
_POOL = Range(0, 10_000)  # the organism's world has no more distinct requests of a kind
_PARALLEL = Range(1, max(64, 2 * (os.cpu_count() or 1)))  # OpenMP ends the process where it gets no more threads

OPTIONS: Mapping[str, Range] = MappingProxyType(
    {
        # 1. Inputs and passes.
        "seed": _SEED, "threads": _PARALLEL, "processes": _PARALLEL, "tokens_per_batch": _SIZE, "max_length": _SIZE,
        "examples": _SIZE, "memory": _POSITIVE,
        # 2. Fine-tuning; names of transformers for arguments of transformers.
        "learning_rate": _AMOUNT, "epochs": Range(0, 10**6, whole=False, open=True), "steps": _SIZE,
        "batch_size": Range(1, 10**6), "save_steps": Range(0, 10**9, whole=False, open=True), "lora": Range(1, 10**5),
        "gradient_accumulation_steps": _SIZE, "weight_decay": _AMOUNT, "data_seed": _SEED,
        "max_grad_norm": Range(0, _OR_NO_LIMIT, whole=False),
        # 3. SPF.
        "anchors_per_step": Range(1, 10**6), "benign_per_step": Range(1, 10**6), "rank": Range(1, 10**6),
        "refresh_every": _SIZE, "refresh_energy": _SHARE, "mix": _AMOUNT, "largest_mix": _POSITIVE,
        "drift_margin": _AMOUNT,
        "benign_margin": Range(-_HUGE, _HUGE, whole=False),
        "correction_limit": Range(0, _OR_NO_LIMIT, whole=False, open=True),
        # 4. Evaluation.
        "max_new_tokens": Range(1, 10**6),
        # 5. Grids: the lists of a block element by element, and the options of arms.
        "seeds": _SEED, "organisms": _SEED, "rates": _POSITIVE, "lengths": Range(0, 10**4, whole=False, open=True),
        "prompts": _SIZE, "along": Range(0, 10**4), "anchors": Range(1, 10_000), "fence": _POOL, "mixed": _POOL,
        "task_steps": _SIZE, "safety_steps": _SIZE, "repair_steps": _COUNT, "rho": _AMOUNT, "rate": _POSITIVE,
        "betas": _AMOUNT, "threshold": Range(-1, 1, whole=False),
        # 6. Statistics.
        "draws": Range(0, 10**7), "null_draws": Range(0, 10**7), "groups": Range(0, 10**6),
        "level": _SHARE, "points": _AMOUNT,
    }
)  # fmt: skip
"""The range of every numeric option, by the option's name in Python."""

MAX_NEW_TOKENS = 256
"""Length of the longest response of an evaluation, in tokens, if nothing else is asked for."""

BATCH_SIZE = 16
"""Prompts that an evaluation answers at a time, if nothing else is asked for."""


def check_option(name: str, value: object, *, shown: str | None = None, error: type[GeomkitError] = DataError) -> None:
    """Check a numeric option against :data:`OPTIONS`.

    Args:
        name: The option's name in the table.
        value: Its value.
        shown: The option as the user writes it, such as ``"--seed"``; the name when left out.
        error: The class of the error.

    Raises:
        GeomkitError: An ``error``, if the value is no number of the option's range.

    Example:
        >>> check_option("batch_size", 0)
        Traceback (most recent call last):
        geomkit.errors.DataError: expected batch_size to be a whole number from 1 to 1,000,000, found 0; ...
    """
    if not OPTIONS[name].holds(value):
        raise error(
            f"expected {shown or name} to be {OPTIONS[name]}, found {_found(value)}; give a number of this range"
        )


def _found(value: object) -> str:
    try:
        return f"{value!r:.40}"
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"


def check_options(options: Mapping[str, object], *, error: type[GeomkitError] = DataError) -> None:
    """Check every option that the table has and that is not ``None``, which stands for an option left out.

    Raises:
        GeomkitError: An ``error``, if a value is no number of its option's range.
    """
    for name, value in options.items():
        if name in OPTIONS and value is not None:
            check_option(name, value, error=error)
