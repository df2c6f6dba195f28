"""The result of an evaluation: shares, means and responses, and its file."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.stats.means import Estimate
from geomkit.stats.proportions import Rate
from geomkit.utils.display import html_table
from geomkit.utils.field_types import fits
from geomkit.utils.figures import DrawnResult, draw, is_figure_file
from geomkit.utils.files import read_json, write_atomically
from geomkit.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

Measure = Rate | Estimate
"""A share of prompts with its Wilson interval, or another number with its interval."""

_FORMAT = "geomkit evaluation 1"
_COLUMNS = ("set", "prompt", "response", "reference", "refused", "exact")


@dataclass(frozen=True)
class Evaluation(DrawnResult):
    """Shares of refusals and of right answers on held-out prompts, and the responses that were counted.

    Attributes:
        refusal: Share of forbidden requests that the model refused; of no prompts (NaN) where none were given.
        over_refusal: Share of benign requests that the model refused; of no prompts (NaN) where none were given.
        skills: Share of right answers, or the value of another metric, by skill.
        responses: One row per prompt: ``set``, ``prompt``, ``response``, ``reference``, ``refused``, ``exact``. Where
            they say something: ``context`` (messages before the prompt), ``harmful``, ``score``, ``value`` (a skill's
            metric; the mean loss for perplexity), and a column per judge with its labels.
        more: Measures of judges that decide more than refusals, by name.
        settings: ``judges``, ``metrics`` by skill, and ``max_new_tokens``.
    """

    refusal: Rate
    over_refusal: Rate
    skills: Mapping[str, Measure]
    responses: "pd.DataFrame" = field(repr=False)
    more: Mapping[str, Measure] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def utility(self) -> float:
        """The mean over the skills, without those judged by perplexity, between 0 and 1; NaN without skills."""
        values = [measure.value for name, measure in self.skills.items() if self._title(name) != "perplexity"]
        return sum(values) / len(values) if values else math.nan

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per measure: ``measure``, its ``value`` with the 95 % interval ``low`` to ``high``, ``n``."""
        import pandas as pd

        rows = [(name, measure.value, *measure.interval, measure.n) for name, measure in self._measures().items()]
        return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n"])

    def to_dict(self) -> dict[str, object]:
        """Return the measures, the settings and the responses, as written by :meth:`save`."""
        return {
            "format": _FORMAT,
            "geomkit": __version__,
            "settings": dict(self.settings),
            "measures": self.to_frame().to_dict("records"),
            "skills": list(self.skills),
            "shares": [name for name, measure in self._measures().items() if isinstance(measure, Rate)],
            "responses": self.responses.to_dict("records"),
        }

    def save(self, path: str | Path) -> Path:
        """Write the evaluation to a JSON file, for :func:`load_evaluation` and ``geomkit compare``, or its figure.

        Args:
            path: The file; a figure is written where it ends in ``.png``, ``.svg``, ``.pdf`` or ``.html``.

        Raises:
            DataError: If the file cannot be written.
        """
        if is_figure_file(path):
            return super().save(path)
        text = json.dumps(_plain(self.to_dict()), indent=1, allow_nan=False, ensure_ascii=False)
        write_atomically(Path(path), text + "\n")
        return Path(path)

    def plot(self) -> "Figure":
        """Draw every measure with its 95 % interval."""
        return draw("plot_evaluation", self)

    def _repr_html_(self) -> str:
        return html_table("Evaluation, with 95 % intervals", self.to_frame(), rows=40)

    def _measures(self) -> dict[str, Measure]:
        """Return all measures of at least one prompt, by the name in tables."""
        measures: dict[str, Measure] = {"refusal": self.refusal, "over-refusal": self.over_refusal}
        measures |= self.more
        measures |= {f"{self._title(name)}: {name}": measure for name, measure in self.skills.items()}
        return {name: measure for name, measure in measures.items() if measure.n}

    def _title(self, skill: str) -> str:
        return str(self.settings.get("metrics", {}).get(skill, "exact match"))


def load_evaluation(path: str | Path) -> Evaluation:
    """Return an evaluation from a file that :meth:`Evaluation.save` or ``geomkit evaluate --json`` wrote.

    Raises:
        DataError: If there is no such file, or it is no evaluation.
    """
    advice = "give a file that geomkit evaluate --json or Evaluation.save wrote"
    content = read_json(Path(path), "an evaluation, as geomkit evaluate --json writes it,", advice)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"expected a file of geomkit evaluate --json at {path}, found format {found!r}; give such a file, or "
            "update geomkit if a later one wrote it"
        )
    try:
        return _evaluation(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"expected an evaluation, as geomkit evaluate --json writes it, at {path}, found {type(error).__name__}: "
            f"{error}; it was changed: evaluate again"
        ) from None


_PARTS: Mapping[str, Any] = {
    "shares": list[str], "skills": list[str], "settings": Mapping[str, object], "responses": list[Mapping[str, object]],
    "measures": list[Mapping[str, str | int | float | None]],
}  # fmt: skip
"""The parts of the file and their types."""

_OUTCOMES = ("refused", "exact", "harmful", "score", "value")
"""The columns of the responses with outcomes."""


def _evaluation(content: Mapping[str, Any]) -> Evaluation:
    """Return the evaluation of a file's content.

    Raises:
        KeyError, TypeError, ValueError: If the content is not as :meth:`Evaluation.to_dict` makes it.
    """
    import pandas as pd

    for name, kind in _PARTS.items():
        if not fits(content[name], kind):
            raise TypeError(f"'{name}' of another type")
    for row in content["responses"]:
        if not fits([row[name] for name in ("set", "prompt")], list[str]) or not fits(row["reference"], str | None):
            raise TypeError("a response of another type")
        if not fits([row.get(name) for name in _OUTCOMES], list[bool | float | None]):
            raise TypeError("the outcome of a response of another type")
    if not fits(content["settings"].get("metrics", {}), Mapping[str, str]):
        raise TypeError("'metrics' of another type")
    shares = set(content["shares"])
    measures = {row["measure"]: _measure(row, share=row["measure"] in shares) for row in content["measures"]}
    titles = content["settings"].get("metrics", {})
    skills = {name: measures.pop(f"{titles.get(name, 'exact match')}: {name}") for name in content["skills"]}
    refusal, over_refusal = (measures.pop(name, Rate(0, 0)) for name in ("refusal", "over-refusal"))
    if not isinstance(refusal, Rate) or not isinstance(over_refusal, Rate):
        raise TypeError("refusals that are no shares")
    responses = pd.DataFrame(content["responses"])
    return Evaluation(refusal, over_refusal, skills, responses, more=measures, settings=content["settings"])


def _measure(row: Mapping[str, Any], *, share: bool) -> Measure:
    numbers = [row[name] for name in ("value", "low", "high")]
    if not fits(row["measure"], str) or not fits(row["n"], int) or not fits(numbers, list[float | None]):
        raise TypeError("a measure of another type")
    if share:
        if not 0 <= row["value"] <= 1:
            raise ValueError(f"a share of {row['value']}")
        return Rate(round(row["value"] * row["n"]), row["n"])
    value, low, high = (math.nan if number is None else float(number) for number in numbers)
    return Estimate(value, low, high, row["n"])


def _plain(value: object) -> object:
    """Return a value as JSON has it: plain numbers, and null for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
