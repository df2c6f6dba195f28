"""Grids of experiments: arms, blocks of scenarios and seeds, and the cells, which are single fine-tunes.

A grid is declared in a TOML file::

    name = "mine"
    prompts = 120                            # held-out prompts of each set

    [arms]
    SFT = { method = "sft" }
    rank1 = { rule = "rank1", anchors = 64 } # options of the method, which is "spf" when left out

    [[block]]                                # a cell for each combination of scenario, arm, seed, …
    scenarios = ["poison-10", "harmful-100"]
    arms = ["SFT", "rank1"]
    seeds = [0, 1]
"""

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from inspect import Parameter, signature
from itertools import product
from pathlib import Path
from typing import Any

from geomkit.errors import DataError, GeomkitError
from geomkit.experiments.attacks import ATTACKS
from geomkit.experiments.methods import ADAPTER_METHODS, METHODS
from geomkit.experiments.organism.scenarios import Scenario
from geomkit.experiments.organism.variants import SHIPPED
from geomkit.experiments.organisms import ENGLISH, scenarios_of
from geomkit.spf.settings import SPF
from geomkit.utils.files import data_dir, reading
from geomkit.utils.options import OPTIONS, check_option
from geomkit.version import __version__


@dataclass(frozen=True)
class Arm:
    """An arm: a way to fine-tune, which is a method with its options.

    Attributes:
        name: The name in tables and figures.
        method: A name in :data:`geomkit.experiments.methods.METHODS`.
        options: The options of the method.
    """

    name: str
    method: str = "spf"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A cell: a single fine-tune with its evaluation.

    Attributes:
        organism: Seed of a small organism, 0 for the one that ships; or ``"english"``.
        scenario: Name of a scenario of the organism, see :func:`geomkit.experiments.organisms.scenarios_of`.
        arm: The arm.
        rate: Multiple of the scenario's learning rate.
        length: Multiple of the scenario's steps.
        seed: Seed of the order of the data and of the anchors drawn.
        prompts: Largest number of held-out prompts taken from each set.
        attacks: Kinds of jailbreak tried afterwards: ``"prefill"``, ``"templates"``, ``"gcg"``.
        along: Number of times that refusal is measured during training.
        curvature: Whether SPF splits each step's drift of the safety loss into a first-order part and curvature, at the
            cost of one more forward pass per step.
    """

    organism: int | str
    scenario: str
    arm: Arm
    rate: float
    length: float
    seed: int
    prompts: int
    attacks: tuple[str, ...] = ()
    along: int = 0
    curvature: bool = False

    @property
    def scenario_definition(self) -> Scenario:
        """The definition of the cell's scenario."""
        return scenarios_of(self.organism)[self.scenario]

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        return self.rate * self.scenario_definition.learning_rate

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(1, round(self.length * self.scenario_definition.steps))

    def describe(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the name of the arm; a record identifies its cell by these fields."""
        values = {attribute.name: getattr(self, attribute.name) for attribute in fields(self)}
        return values | {"arm": self.arm.name, "attacks": list(self.attacks)}

    @property
    def digest(self) -> str:
        """Ten hexadecimal digits, a hash of geomkit's version, the cell, its arm and its scenario."""
        everything = [__version__, asdict(self), asdict(self.scenario_definition)]
        return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:10]

    @property
    def file_name(self) -> str:
        """A readable file name that ends in the digest."""
        words = (self.scenario, self.arm.name, f"x{self.rate:g}", f"x{self.length:g}", self.organism, self.seed)
        return re.sub(r"[^\w.-]+", "-", "_".join(map(str, words))) + f"_{self.digest}.json"


@dataclass(frozen=True)
class Grid:
    """The cells of an experiment.

    Attributes:
        name: The name of the grid and of its results.
        cells: The cells, each of them once.
    """

    name: str
    cells: tuple[Cell, ...] = field(repr=False)

    @property
    def seeds(self) -> list[int]:
        """Seeds of the small organisms in the grid, in ascending order."""
        return sorted({cell.organism for cell in self.cells if isinstance(cell.organism, int)})

    def shard(self, number: int, count: int) -> "Grid":
        """Return one of ``count`` parts of the grid, for the jobs of a job array.

        Every cell is in one part, the same on every machine. The parts have equally many cells, up to one, so that
        parts of a small grid may be empty. Cells that are alike, such as those of an arm, are spread over the parts.

        Args:
            number: Number of the part, from 1.
            count: Number of parts.

        Raises:
            DataError: If ``number`` is not between 1 and ``count``.

        Example:
            >>> grid = load_grid("smoke")
            >>> [len(grid.shard(number, 3).cells) for number in (1, 2, 3)], len(grid.cells)
            ([6, 5, 5], 16)
        """
        if not 1 <= number <= count:
            raise DataError(f"expected a part of the grid from 1/{count} to {count}/{count}, found {number}/{count}")
        # The order of the digests is as good as random, and depends on nothing but the cells.
        digests = {cell.file_name: hashlib.sha256(cell.file_name.encode()).digest() for cell in self.cells}
        own = set(sorted(digests, key=digests.__getitem__)[number - 1 :: count])
        return Grid(self.name, tuple(cell for cell in self.cells if cell.file_name in own))


def load_grid(source: str | Path) -> Grid:
    """Return the grid that a TOML file declares.

    Args:
        source: A TOML file, or a shipped grid: ``"default"``, ``"limits"``, ``"english"`` or ``"smoke"``.

    Raises:
        DataError: If there is no such file, or it contains an unknown name or a wrong value.

    Example:
        >>> len(load_grid("smoke").cells) > 3
        True
    """
    shipped = data_dir() / "experiments" / f"{source}.toml"
    with reading(source):
        path = Path(source) if Path(source).is_file() else shipped
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in (data_dir() / "experiments").glob("*.toml")))
            raise DataError(f"expected a TOML file or a shipped grid ({names}), found '{source}'")
        try:
            declared = tomllib.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:  # bad TOML, bad UTF-8, a number of thousands of digits, nesting
            raise DataError(f"{path}: expected TOML, found {error}") from None
    return _grid(declared, path)


_MOST_CELLS = 100_000
"""Largest number of cells of a block, which is a product of lists."""

_LONGEST_NAME = 100
"""Largest number of characters of an arm's name, which is a part of file names."""


_BLOCK: Mapping[str, Any] = {
    "scenarios": None, "arms": None, "seeds": [0], "organisms": [0], "rates": [1.0], "lengths": [1.0],
    "attacks": [], "along": 0, "curvature": False, "prompts": None,
}  # fmt: skip
"""The names that a block may contain, with their defaults.

``None`` stands for the value at the top of the file; of ``scenarios``, for those of the small organism.
"""


def _grid(declared: dict[str, Any], path: Path) -> Grid:
    _check_names(declared, ("name", "prompts", "arms", "block"), path)
    _check_tables(declared, path)
    arms = {
        name: Arm(name, str(options.get("method", "spf")), {k: v for k, v in options.items() if k != "method"})
        for name, options in declared.get("arms", {}).items()
    }
    _check_arms(arms, path)
    common = {**_BLOCK, "arms": list(arms), "prompts": declared.get("prompts", 120)}
    cells: dict[tuple[Any, ...], Cell] = {}
    for block in declared.get("block", []):
        _check_names(block, _BLOCK, path)
        settings = {**common, "scenarios": list(scenarios_of(SHIPPED)), **block}
        for cell in _cells(settings, arms, path):
            # A cell of two blocks is run once, with all measurements of both.
            key = (cell.organism, cell.scenario, cell.arm.name, cell.rate, cell.length, cell.seed)
            cells[key] = _merge(cells[key], cell) if key in cells else cell
    if not cells:
        raise DataError(f"{path}: expected at least one [[block]] with scenarios and arms, found no cell")
    return Grid(declared.get("name", path.stem), tuple(cells.values()))


_NAMES = ("scenarios", "arms", "attacks")
"""The lists of a block whose elements are names."""

_NUMBERS = ("organisms", "seeds", "rates", "lengths")
"""The lists of a block whose elements are numbers of the range that the table of options gives."""


def _check_tables(declared: Mapping[str, Any], path: Path) -> None:
    arms, blocks = declared.get("arms", {}), declared.get("block", [])
    if not (isinstance(arms, dict) and all(isinstance(arm, dict) for arm in arms.values())):
        raise DataError(f"{path}: expected [arms] of the form {{ rule = … }} or {{ method = … }}, found {arms!r}")
    if not isinstance(name := declared.get("name", ""), str):
        raise DataError(f"{path}: expected name = a string, found {name!r:.80}")
    if not (isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks)):
        raise DataError(f"{path}: expected blocks under [[block]], found {blocks!r}")


def _check_values(block: Mapping[str, Any], path: Path) -> None:
    for name in _NAMES:
        if not isinstance(block[name], list) or not all(isinstance(value, str) for value in block[name]):
            raise DataError(f"{path}: expected {name} = a list of strings, found {block[name]!r:.80}")
    for name in _NUMBERS:
        if not isinstance(block[name], list):
            raise DataError(f"{path}: expected {name} = a list of numbers, found {block[name]!r:.80}")
        for value in block[name]:
            if (name, value) != ("organisms", ENGLISH):
                check_option(name, value, shown=f"in {path} each of {name}")
    for name in ("prompts", "along"):
        check_option(name, block[name], shown=f"in {path} {name}")
    if (cells := math.prod(len(block[name]) for name in ("scenarios", "arms", *_NUMBERS))) > _MOST_CELLS:
        raise DataError(
            f"{path}: expected at most {_MOST_CELLS:,} cells in a block, found {cells:,}; shorten its lists"
        )
    if not isinstance(block["curvature"], bool):
        raise DataError(f"{path}: expected curvature = true or false, found {block['curvature']!r}")


def _check_arms(arms: Mapping[str, Arm], path: Path) -> None:
    _check_names([arm.method for arm in arms.values()], METHODS, path)
    for arm in arms.values():
        if len(arm.name) > _LONGEST_NAME:
            raise DataError(f"{path}: expected names of arms up to {_LONGEST_NAME} characters, found '{arm.name:.40}…'")
        try:
            check_options(arm.method, arm.options)
        except GeomkitError as error:
            raise DataError(f"{path}: arm '{arm.name}': {error}") from None


def _cells(block: Mapping[str, Any], arms: Mapping[str, Arm], path: Path) -> list[Cell]:
    _check_values(block, path)
    for name, allowed in (("arms", arms), ("attacks", ATTACKS)):
        _check_names(block[name], allowed, path)
    for organism in block["organisms"]:
        _check_names(block["scenarios"], scenarios_of(organism), path)
        _check_adapters(organism, block, arms, path)
    axes = ("organisms", "scenarios", "arms", "rates", "lengths", "seeds")
    return [
        Cell(
            organism, scenario, arms[arm], float(rate), float(length), seed, block["prompts"],
            tuple(block["attacks"]), block["along"], block["curvature"],
        )
        for organism, scenario, arm, rate, length, seed in product(*(block[axis] for axis in axes))
    ]  # fmt: skip


def _check_adapters(organism: int | str, block: Mapping[str, Any], arms: Mapping[str, Arm], path: Path) -> None:
    """Refuse arms that train all weights in a scenario that trains adapters."""
    if any(scenarios_of(organism)[name].lora for name in block["scenarios"]):
        for arm in block["arms"]:
            if arms[arm].method not in ADAPTER_METHODS:
                raise DataError(
                    f"{path}: expected scenarios that train all weights for the arm '{arm}', whose method "
                    f"'{arms[arm].method}' does, found one with adapters; take those whose names end in ', full'"
                )


def _merge(a: Cell, b: Cell) -> Cell:
    return Cell(
        a.organism, a.scenario, a.arm, a.rate, a.length, a.seed, max(a.prompts, b.prompts),
        tuple(sorted({*a.attacks, *b.attacks})), max(a.along, b.along), a.curvature or b.curvature,
    )  # fmt: skip


def _check_names(names: Iterable[str], allowed: Iterable[str], path: Path) -> None:
    if unknown := sorted(set(names) - set(allowed)):
        raise DataError(
            f"{path}: expected {', '.join(allowed)}, found {', '.join(map(repr, unknown))}; rename or remove what is "
            "not listed"
        )


_SPF_OPTIONS = {option.name for option in fields(SPF)} - {"benign", "seed", "measure_curvature", "tokenizer", "log"}
"""The options of SPF that an arm may give; the other options follow from the cell."""


def method_options(method: str) -> set[str]:
    """Return the names of the options that a method takes.

    Example:
        >>> sorted(method_options("lisa"))
        ['anchors', 'rho', 'safety_steps', 'task_steps']
    """
    options = _keywords(METHODS[method])
    if method in {"spf", "scaled-sft"}:
        options |= _keywords(METHODS["spf"]) | _SPF_OPTIONS
    return options


def _keywords(function: Callable[..., Any]) -> set[str]:
    parameters = signature(function).parameters.items()
    return {name for name, parameter in parameters if parameter.kind is Parameter.KEYWORD_ONLY}


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse options that would fail when the arm is run.

    Args:
        method: A name in :data:`geomkit.experiments.methods.METHODS`.
        options: The options by name.

    Raises:
        DataError: If the method does not take one of the options, or a number is out of its range.
        SPFError: If there is no such rule, or the rule does not go with its options.
    """
    allowed = method_options(method)
    if unknown := sorted(set(options) - allowed):
        words = ", ".join(sorted(allowed)) or "none"
        raise DataError(
            f"expected options of the method '{method}' ({words}), found {', '.join(unknown)}; remove what is not "
            "listed"
        )
    for name in options.keys() & OPTIONS.keys():
        for value in options[name] if isinstance(options[name], list) else [options[name]]:
            check_option(name, value)
    if method in {"spf", "scaled-sft"}:
        # In a grid ``anchors`` is a number, in SPF it is a set of examples, which is not needed to check the rule.
        rule_options = {name: options[name] for name in options if name in _SPF_OPTIONS - {"anchors"}}
        SPF("", **rule_options).checked_rule()
