"""What is to be run: arms, blocks of scenarios and seeds, and the single fine-tunes that they make, the cells.

A grid is declared in one TOML file::

    name = "mine"
    prompts = 120                            # held-out prompts of each set

    [arms]
    SFT = { method = "sft" }
    rank1 = { rule = "rank1", anchors = 64 } # options of the method, which is "spf" when left out

    [[block]]                                # every scenario with every arm, seed, …
    scenarios = ["poison-10", "harmful-100"]
    arms = ["SFT", "rank1"]
    seeds = [0, 1]
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from inspect import Parameter, signature
from itertools import product
from pathlib import Path
from typing import Any

from geomkit.errors import DataError, GeomkitError
from geomkit.experiments import methods, rivals
from geomkit.experiments.methods import METHODS
from geomkit.experiments.organism.scenarios import SCENARIOS, VARIANTS, Scenario
from geomkit.spf.settings import SPF
from geomkit.utils.files import data_dir
from geomkit.version import __version__

EVERY_SCENARIO: Mapping[str, Scenario] = {**SCENARIOS, **VARIANTS}
"""Every scenario that a cell may fine-tune on."""


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        name: What tables and figures call it.
        method: A name in :data:`geomkit.experiments.METHODS`.
        options: The method's own options.
    """

    name: str
    method: str = "spf"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One fine-tune and what is measured after it.

    Attributes:
        organism: Seed of the organism; 0 is the one that ships.
        scenario: A name in :data:`EVERY_SCENARIO`.
        arm: How it is fine-tuned.
        rate: Multiple of the scenario's learning rate.
        length: Multiple of the scenario's steps.
        seed: Seed of the order of the data and of the anchors drawn.
        prompts: The most held-out prompts taken of each set.
        attacks: Which jailbreaks are tried afterwards: ``"prefill"``, ``"templates"``, ``"gcg"``.
        along: How many times refusal is measured on the way.
        curvature: Whether each step's drift is split, at the price of one more forward pass.
    """

    organism: int
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
    def recipe(self) -> Scenario:
        """The scenario itself."""
        return EVERY_SCENARIO[self.scenario]

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.rate * self.recipe.learning_rate

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(1, round(self.length * self.recipe.steps))

    def describe(self) -> dict[str, Any]:
        """Return what the result is identified by."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        return own | {"arm": self.arm.name, "attacks": list(self.attacks)}

    @property
    def file_name(self) -> str:
        """A readable name with a hash of all that the result depends on, the recipe too."""
        everything = [__version__, asdict(self), asdict(self.recipe)]
        digest = hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:10]
        words = (self.scenario, self.arm.name, f"x{self.rate:g}", f"x{self.length:g}", self.organism, self.seed)
        return re.sub(r"[^\w.-]+", "-", "_".join(map(str, words))) + f"_{digest}.json"


@dataclass(frozen=True)
class Grid:
    """The cells of an experiment.

    Attributes:
        name: What its results are called.
        cells: What is run, none twice.
    """

    name: str
    cells: tuple[Cell, ...] = field(repr=False)

    @property
    def organisms(self) -> list[int]:
        """Seeds of the organisms that take part."""
        return sorted({cell.organism for cell in self.cells})


def load_grid(source: str | Path) -> Grid:
    """Read a grid.

    Args:
        source: A shipped grid, ``"default"``, ``"limits"`` or ``"smoke"``, or a TOML file.

    Raises:
        DataError: If there is no such file, or it says something that no grid has.

    Example:
        >>> len(load_grid("smoke").cells) > 3
        True
    """
    shipped = data_dir() / "experiments" / f"{source}.toml"
    path = Path(source) if Path(source).is_file() else shipped
    if not path.is_file():
        names = ", ".join(sorted(one.stem for one in shipped.parent.glob("*.toml")))
        raise DataError(f"expected a TOML file or a shipped grid ({names}), found '{source}'")
    try:
        declared = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected TOML, found {error}") from None
    return _grid(declared, path)


_BLOCK: Mapping[str, Any] = {
    "scenarios": list(EVERY_SCENARIO), "arms": None, "seeds": [0], "organisms": [0], "rates": [1.0], "lengths": [1.0],
    "attacks": [], "along": 0, "curvature": False, "prompts": None,
}  # fmt: skip
"""What a block may say, and what it says when it does not; ``None`` is taken from the file's top."""


def _grid(declared: dict[str, Any], path: Path) -> Grid:
    _known(declared, ("name", "prompts", "arms", "block"), path)
    _check_tables(declared, path)
    arms = {
        name: Arm(name, str(options.get("method", "spf")), {k: v for k, v in options.items() if k != "method"})
        for name, options in declared.get("arms", {}).items()
    }
    _check_arms(arms, path)
    common = {**_BLOCK, "arms": list(arms), "prompts": declared.get("prompts", 120)}
    cells: dict[tuple[Any, ...], Cell] = {}
    for block in declared.get("block", []):
        _known(block, _BLOCK, path)
        for cell in _cells({**common, **block}, arms, path):
            # A cell that two blocks ask for is run once, with all that either wants measured.
            key = (cell.organism, cell.scenario, cell.arm.name, cell.rate, cell.length, cell.seed)
            cells[key] = _merged(cells[key], cell) if key in cells else cell
    if not cells:
        raise DataError(f"{path}: expected at least one [[block]] with scenarios and arms, found no cell")
    return Grid(declared.get("name", path.stem), tuple(cells.values()))


_KINDS: Mapping[str, tuple[type, ...]] = {
    "scenarios": (str,), "arms": (str,), "attacks": (str,), "seeds": (int,), "organisms": (int,),
    "rates": (int, float), "lengths": (int, float),
}  # fmt: skip
"""What the lists of a block hold."""


def _check_tables(declared: Mapping[str, Any], path: Path) -> None:
    arms, blocks = declared.get("arms", {}), declared.get("block", [])
    if not (isinstance(arms, dict) and all(isinstance(one, dict) for one in arms.values())):
        raise DataError(f"{path}: expected [arms] of the form {{ rule = … }} or {{ method = … }}, found {arms!r}")
    if not (isinstance(blocks, list) and all(isinstance(one, dict) for one in blocks)):
        raise DataError(f"{path}: expected blocks under [[block]], found {blocks!r}")


def _check_values(block: Mapping[str, Any], path: Path) -> None:
    for name, kinds in _KINDS.items():
        values, least = block[name], 0 if name in {"seeds", "organisms"} else 1e-9
        fits = isinstance(values, list) and all(type(one) in kinds for one in values)
        if not fits or (str not in kinds and any(one < least for one in values)):
            words = "strings" if str in kinds else "whole numbers from 0" if float not in kinds else "numbers above 0"
            raise DataError(f"{path}: expected {name} = a list of {words}, found {values!r}")
    for name, least in (("prompts", 1), ("along", 0)):
        if type(block[name]) is not int or block[name] < least:
            raise DataError(f"{path}: expected {name} = a whole number from {least}, found {block[name]!r}")
    if not isinstance(block["curvature"], bool):
        raise DataError(f"{path}: expected curvature = true or false, found {block['curvature']!r}")


def _check_arms(arms: Mapping[str, Arm], path: Path) -> None:
    from geomkit.experiments.methods import METHODS

    _known([arm.method for arm in arms.values()], METHODS, path)
    for arm in arms.values():
        try:
            check_options(arm.method, arm.options)
        except GeomkitError as error:
            raise DataError(f"{path}: arm '{arm.name}': {error}") from None


def _cells(block: Mapping[str, Any], arms: Mapping[str, Arm], path: Path) -> list[Cell]:
    from geomkit.experiments.attacks import KINDS

    _check_values(block, path)
    for name, known in (("scenarios", EVERY_SCENARIO), ("arms", arms), ("attacks", KINDS)):
        _known(block[name], known, path)
    axes = ("organisms", "scenarios", "arms", "rates", "lengths", "seeds")
    return [
        Cell(
            organism, scenario, arms[arm], float(rate), float(length), seed, block["prompts"],
            tuple(block["attacks"]), block["along"], block["curvature"],
        )
        for organism, scenario, arm, rate, length, seed in product(*(block[axis] for axis in axes))
    ]  # fmt: skip


def _merged(a: Cell, b: Cell) -> Cell:
    return Cell(
        a.organism, a.scenario, a.arm, a.rate, a.length, a.seed, max(a.prompts, b.prompts),
        tuple(sorted({*a.attacks, *b.attacks})), max(a.along, b.along), a.curvature or b.curvature,
    )  # fmt: skip


def _known(found: Iterable[str], known: Iterable[str], path: Path) -> None:
    if unknown := sorted(set(found) - set(known)):
        raise DataError(f"{path}: expected {', '.join(known)}, found {', '.join(map(repr, unknown))}")


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
