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
from geomkit.utils.display import Result, html_table
from geomkit.utils.figures import draw
from geomkit.utils.files import write_atomically
from geomkit.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

Measure = Rate | Estimate
"""A share of prompts with its Wilson interval, or another number with its interval."""

_FORMAT = "geomkit evaluation 1"
_COLUMNS = ("set", "prompt", "response", "reference", "refused", "exact")


@dataclass(frozen=True)
class Evaluation(Result):
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
        """Write the evaluation to a JSON file, for :func:`load_evaluation` and ``geomkit compare``.

        Raises:
            OSError: If the file cannot be written.
        """
        text = json.dumps(_plain(self.to_dict()), indent=1, allow_nan=False, ensure_ascii=False)
        write_atomically(Path(path), text + "\n")
        return Path(path)

    def plot(self) -> "Figure":
        """Draw every measure with its 95 % interval."""
        return draw("plot_evaluation", self)

    def _repr_html_(self) -> str:
        return html_table("Evaluation, with 95 % Wilson intervals", self.to_frame())

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
    import pandas as pd

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"expected an evaluation at {path}, found {reason}; write one with geomkit evaluate --json"
        ) from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"expected a file of geomkit evaluate --json at {path}, found format {found!r}")
    shares = set(content["shares"])
    measures = {row["measure"]: _measure(row, share=row["measure"] in shares) for row in content["measures"]}
    titles = content["settings"].get("metrics", {})
    skills = {name: measures.pop(f"{titles.get(name, 'exact match')}: {name}") for name in content["skills"]}
    refusal, over_refusal = (measures.pop(name, Rate(0, 0)) for name in ("refusal", "over-refusal"))
    assert isinstance(refusal, Rate)  # noqa: S101 - shares always
    assert isinstance(over_refusal, Rate)  # noqa: S101
    responses = pd.DataFrame(content["responses"])
    return Evaluation(refusal, over_refusal, skills, responses, more=measures, settings=content["settings"])


def _measure(row: Mapping[str, Any], *, share: bool) -> Measure:
    if share:
        return Rate(round(row["value"] * row["n"]), row["n"])
    value, low, high = (math.nan if row[name] is None else float(row[name]) for name in ("value", "low", "high"))
    return Estimate(value, low, high, row["n"])


def _plain(value: object) -> object:
    """Return a value as JSON has it: plain numbers, and null for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
