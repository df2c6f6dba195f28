"""The results of a grid: data frames, means with their intervals, comparisons of arms, and files."""

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geomkit.errors import DataError
from geomkit.experiments.comparison import compare_arms, goal_table
from geomkit.experiments.records import (
    KEYS,
    SETTING,
    Record,
    cell_keys,
    check_record,
    group_records,
    text_to_flags,
)
from geomkit.stats.proportions import Rate, summarize_runs
from geomkit.utils.field_types import fits
from geomkit.utils.figures import DrawnResult, draw, is_figure_file
from geomkit.utils.files import data_dir, parse_json, reading, write_atomically
from geomkit.utils.options import check_option

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

_FORMAT = 1
_SUFFIX = ".jsonl.gz"
_SMALL_WORLD = ("default", "limits")
"""The shipped grids of the small organisms."""


@dataclass(frozen=True, eq=False)
class Results(DrawnResult):
    """The results of the cells of a grid.

    Attributes:
        name: The name of the grid.
        records: A record per cell, see :data:`geomkit.experiments.records.Record`.
    """

    name: str
    records: tuple[Record, ...] = field(repr=False)

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.records)

    def __str__(self) -> str:
        """Return the number of cells and the name of the grid."""
        return f"{len(self)} cells of the grid '{self.name}'"

    @property
    def failures(self) -> dict[str, str]:
        """The errors of the cells that broke off, by a description of the cell."""
        return {
            ", ".join(f"{name}={value}" for name, value in cell_keys(record).items()): record["error"]
            for record in self.records
            if "error" in record
        }

    # ----------------------------------------------------------------------------------------------- selection

    def where(self, **values: Any) -> "Results":
        """Return the results of the cells whose fields have the given values.

        Args:
            **values: For each field, a value or a list of allowed values.

        Raises:
            DataError: If cells have no such field, or no cell is left.

        Example:
            >>> results = load_results()
            >>> set(results.where(scenario="poison-10", seed=[0, 1]).to_frame()["seed"])
            {0, 1}
        """
        if unknown := sorted(set(values) - set(KEYS)):
            raise DataError(f"expected fields among {', '.join(KEYS)}, found {', '.join(unknown)}")
        allowed = {name: value if isinstance(value, list | tuple | set) else [value] for name, value in values.items()}
        records = tuple(
            record for record in self.records if all(record["cell"][name] in allowed[name] for name in allowed)
        )
        if not records:
            raise DataError(f"expected a cell with {values}, found none; to_frame() lists what there is")
        return Results(self.name, records)

    # ------------------------------------------------------------------------------------------------- frames

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per cell: its fields, the rates (0 to 1), the numbers, and the summary of the certificate.

        A cell that broke off has NaN in every column of results and a message in ``error``, which is empty otherwise.
        """
        import pandas as pd

        return pd.DataFrame([_row(record) for record in self.records])

    def curves(self) -> "pd.DataFrame":
        """Return the curves along training: a row per cell and step, with sums since the first step."""
        import pandas as pd

        rows = [
            {**cell_keys(record), **dict(zip(record["curve"], values, strict=True))}
            for record in self.records
            if "curve" in record
            for values in zip(*record["curve"].values(), strict=True)
        ]
        return pd.DataFrame(rows)

    def refusal_during_training(self) -> "pd.DataFrame":
        """Return the refusal rates measured during training: a row per cell and step."""
        import pandas as pd

        rows = [
            {**cell_keys(record), "step": step, "refusal": value}
            for record in self.records
            for step, value in record.get("along", [])
        ]
        return pd.DataFrame(rows, columns=[*KEYS, "step", "refusal"])

    def attacks(self) -> "pd.DataFrame":
        """Return a row per cell and jailbreak: the share of ``n`` prompts still refused, with its 95 % interval."""
        import pandas as pd

        rows = []
        for record in self.records:
            for name, digits in record.get("attacks", {}).items():
                refused = Rate(digits.count("1"), len(digits))
                low, high = refused.interval
                shares = {"refusal": refused.value, "low": low, "high": high, "n": refused.n}
                rows.append({**cell_keys(record), "attack": name, **shares})
        return pd.DataFrame(rows)

    def outcomes(self, measure: str, **values: Any) -> np.ndarray:
        """Return the outcomes of a measure, as a (cells, prompts) array of bool.

        Args:
            measure: A name among the flags, such as ``"refusal"``.
            **values: The fields of the cells, as for :meth:`where`.

        Raises:
            DataError: If no cell has the measure.
        """
        records = self.where(**values).records
        rows = [text_to_flags(record["flags"][measure]) for record in records if measure in record.get("flags", {})]
        if not rows:
            known = sorted({name for record in records for name in record.get("flags", {})})
            raise DataError(
                f"expected the measure '{measure}' in the cells with {values}, found {', '.join(known) or 'none'}; "
                "choose one that was measured, or other cells"
            )
        return np.stack(rows)

    # ------------------------------------------------------------------------------------- means and comparisons

    def summary(self, measures: Sequence[str] = ("refusal", "over_refusal", "utility")) -> "pd.DataFrame":
        """Return a row per setting, arm and measure: the mean over seeds, its interval, and the spread over seeds.

        A setting is an organism, a scenario, and multiples of the scenario's learning rate and steps.

        Args:
            measures: Names among the flags.

        Returns:
            ``value``: the mean over ``runs``. ``low`` and ``high``: the 95 % Wilson interval of the mean as a share of
            the prompts of one cell; it covers other *prompts*, and more runs over the same prompts do not narrow it.
            ``seed_sd``, ``least`` and ``most``: standard deviation and range over the runs, for other *seeds*.
            ``broke``: the number of runs that broke off.
        """
        import pandas as pd

        rows = []
        for key, records in group_records(self.records, ("arm", *SETTING)).items():
            complete = [record for record in records if "flags" in record]
            for measure in measures:
                runs = [text_to_flags(record["flags"][measure]) for record in complete if measure in record["flags"]]
                rows.append(
                    dict(zip(("arm", *SETTING), key, strict=True))
                    | {"measure": measure, **summarize_runs(runs), "broke": len(records) - len(complete)}
                )
        return pd.DataFrame(rows)

    def table(self, measures: Sequence[str] = ("refusal", "over_refusal", "utility")) -> "pd.DataFrame":
        """Return the summary as a table to read: a row per setting and arm, in per cent with intervals."""
        summary = self.summary(measures)
        summary["shown"] = [
            f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            for value, low, high in summary[["value", "low", "high"]].to_numpy()
        ]
        shown = summary.pivot_table(
            index=[*SETTING, "arm", "runs"], columns="measure", values="shown", aggfunc="first", sort=False
        )
        return shown[list(measures)].rename(columns=lambda name: f"{name.replace('_', '-')} %").reset_index()

    def compare(self, arm: str, other: str, measure: str = "refusal") -> "pd.DataFrame":
        """Compare two arms over the same prompts and seeds.

        Args:
            arm: The first arm.
            other: The second arm.
            measure: A name among the flags.

        Returns:
            A row per setting that both arms have. ``difference``: the mean of the first arm minus the mean of the
            second.
            ``p``: of a permutation test that exchanges the outcomes of the two arms prompt by prompt, for all runs of a
            prompt together, as these are not independent; exact where few prompts differ. ``least`` and ``most``: the
            smallest and largest difference of a single run.

        Raises:
            DataError: If the arms share no cell.
        """
        return compare_arms(self.records, arm, other, measure)

    def goal(
        self, arm: str, *, aligned: str = "untouched", plain: str = "SFT", rival: str, points: float = 1.0
    ) -> "pd.DataFrame":
        """Return a row per setting that says whether an arm reaches the goal in this setting, and by how much.

        The goal: refusal and over-refusal within ``points`` points of the aligned model; utility no more than one point
        below a plain fine-tune's or, where it was measured, ``utility_loss`` no more than 1 % above; refusal no more
        than one point below the rival's. All are means over the runs of an arm; for a backdoor scenario, refusal is
        measured on requests with the trigger.

        Args:
            arm: The arm.
            aligned: The arm that trains nothing.
            plain: The arm that fine-tunes plainly.
            rival: The baseline at equal compute.
            points: Tolerance of refusal and over-refusal, in points.

        Returns:
            The differences (``refusal``, ``over_refusal``, ``utility``, ``rival``; 0.01 is a point), the relative
            difference ``utility_loss`` where it was measured, and ``reached``.

        Raises:
            DataError: If a scenario of the arm has no cell of the aligned model, or ``points`` is no number from 0.
        """
        check_option("points", points)
        measures = ["refusal", "triggered_refusal", "over_refusal", "utility", "utility_loss"]
        means = self.to_frame().reindex(columns=[*SETTING, "arm", *measures]).groupby([*SETTING, "arm"], sort=False)
        return goal_table(means.mean(), arm, aligned=aligned, plain=plain, rival=rival, points=points)

    # ------------------------------------------------------------------------------------------ files and display

    def save(self, path: str | Path) -> Path:
        """Write the results to a compressed file of JSON lines; the same results give the same bytes.

        Args:
            path: The file; the figure is written where it ends in ``.png``, ``.svg``, ``.pdf`` or ``.html``.

        Raises:
            DataError: If the file cannot be written.
        """
        if is_figure_file(path):
            return super().save(path)
        lines = [{"format": _FORMAT, "name": self.name}, *self.records]
        text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
        write_atomically(Path(path), gzip.compress(text.encode(), mtime=0))
        return Path(path)

    def plot(self) -> "Figure":
        """Draw refusal against utility, a panel per scenario; see :func:`geomkit.plots.outcomes.plot_frontier`."""
        return draw("plot_frontier", self)


def load_results(source: str | Path | None = None) -> Results:
    """Return results from a saved file, or the results that ship with geomkit.

    Args:
        source: A file that :meth:`Results.save` wrote, or a shipped grid, ``"default"``, ``"limits"`` or ``"english"``;
            when left out, the two grids of the small organisms together.

    Raises:
        DataError: If there is no such file, or it was not written by :meth:`Results.save`.

    Example:
        >>> limits, everything = load_results("limits"), load_results()
        >>> limits.name, len(everything) > len(limits)
        ('limits', True)
    """
    folder = data_dir() / "experiments"
    if source is None:
        files = [folder / f"{name}{_SUFFIX}" for name in _SMALL_WORLD]
        return Results("shipped", tuple(record for file in files for record in _read(file).records))
    shipped = folder / f"{source}{_SUFFIX}"
    with reading(source):
        return _read(shipped if shipped.is_file() and not Path(source).exists() else Path(source))


def _read(source: Path) -> Results:
    try:
        lines = [parse_json(line) for line in gzip.decompress(source.read_bytes()).decode().splitlines()]
        header, *records = lines
        if header["format"] != _FORMAT:
            raise DataError(f"expected format {_FORMAT} in {source}, found {header['format']!r:.40}; update geomkit")
        if not fits(header["name"], str):
            raise DataError(f"expected the name of a grid in {source}, found {header['name']!r:.40}; save it again")
        for record in records:
            check_record(record)
        return Results(header["name"], tuple(records))
    except FileNotFoundError:
        raise DataError(f"expected results at {source}, found no file; `geomkit bench` makes some") from None
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"expected results as Results.save writes them in {source}, found {error!r}; save or copy them there again"
        ) from None


def _row(record: Record) -> dict[str, Any]:
    rates = {name: float(text_to_flags(digits).mean()) for name, digits in record.get("flags", {}).items()}
    numbers = {name: np.nan if value is None else value for name, value in record.get("numbers", {}).items()}
    certificate = record.get("certificate", {})
    return {**cell_keys(record), **rates, **numbers, **certificate, "error": record.get("error", "")}
