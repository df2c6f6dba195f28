"""Everyone who takes part, in the order of the table."""

from tests.benchmarks.floor import FLOOR
from tests.benchmarks.opponents import OPPONENTS
from tests.benchmarks.toolkit import TOOLKIT
from tests.benchmarks.with_bergson import BERGSON

CONTENDERS = (*TOOLKIT, *FLOOR, *OPPONENTS, *BERGSON)
