"""The stored results of the study of the screen, as data frames."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.utils.field_types import fits
from geomkit.utils.figures import DrawnResult, draw, is_figure_file
from geomkit.utils.files import data_dir, read_json, write_atomically

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

StudyRow = dict[str, float | str | None]
"""A row of a table: numbers and names, by column; ``None`` for a share of nothing."""


@dataclass(frozen=True, eq=False)
class ScreeningStudy(DrawnResult):
    """What the study of the screen found on a world.

    Attributes:
        world: ``"small"`` or ``"english"``.
        detections: For each case and ranking, AUROC and precision with their intervals.
        flags: For each case and method, the share of planted rows that is flagged at the default level, and the share
            of flagged rows that is clean.
        false_positives: For each kind of clean rows, null and method, the share of rows with a p-value up to a level.
        outcomes: For each scenario, arm and seed, the rates of the fine-tuned model.
    """

    world: str
    detections: tuple[StudyRow, ...] = field(repr=False)
    flags: tuple[StudyRow, ...] = field(repr=False)
    false_positives: tuple[StudyRow, ...] = field(repr=False)
    outcomes: tuple[StudyRow, ...] = field(repr=False)

    def to_frame(self, table: str = "detections") -> "pd.DataFrame":
        """Return a table of the study, by the name of its attribute.

        Raises:
            DataError: If there is no table of this name.
        """
        import pandas as pd

        tables = {name: value for name, value in vars(self).items() if isinstance(value, tuple)}
        if table not in tables:
            raise DataError(f"expected one of {', '.join(tables)}, found {table!r:.40}; choose one of these")
        return pd.DataFrame(list(tables[table]))

    def plot(self) -> "go.Figure":
        """Draw how well each ranking finds the planted rows, see :mod:`geomkit.plots.screening_study`."""
        return draw("plot_screening_detection", self)

    def __str__(self) -> str:
        """Return the world and the numbers of rows of the tables."""
        cases = {row["case"] for row in self.detections}
        return (
            f"study of the screen on the {self.world} world: {len(cases)} cases, {len(self.false_positives)} shares of "
            f"clean rows, {len(self.outcomes)} fine-tunes"
        )

    def save(self, path: str | Path) -> Path:
        """Write the study to a JSON file, which :func:`load_screening_study` loads, or its figure to a file.

        Args:
            path: A file that ends in ``.json``, or one for the figure, see
                :meth:`geomkit.utils.figures.DrawnResult.save`.

        Returns:
            The path.

        Raises:
            DataError: If the file cannot be written.
        """
        if is_figure_file(path):
            return super().save(path)
        write_atomically(Path(path), json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        return Path(path)


def load_screening_study(source: str | Path = "small") -> ScreeningStudy:
    """Return the study of a world that ships, or of a file.

    Args:
        source: ``"small"``, ``"english"``, or the path of a file that :meth:`ScreeningStudy.save` wrote.

    Raises:
        DataError: If there is no such file, or it is no study.
    """
    shipped = data_dir() / "experiments" / f"screening-{source}.json"
    path = shipped if source in {"small", "english"} else Path(source)
    content = read_json(path, "a study of the screen", "give 'small', 'english' or a file of ScreeningStudy.save")
    try:
        tables = {name: tuple(rows) for name, rows in content.items() if name != "world"}
        if not fits(content, Mapping[str, object]) or not fits(tables, Mapping[str, tuple[dict[str, object], ...]]):
            raise TypeError("other fields")
        return ScreeningStudy(content["world"], **tables)
    except (TypeError, KeyError, AttributeError):
        raise DataError(f"expected a study of the screen in {path}, found other JSON; run the study again") from None
