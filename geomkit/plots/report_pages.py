"""Reports of results: their title, head and sections, with figures, tables, and sentences with the numbers."""

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from geomkit.analysis.analysis import Analysis
from geomkit.analysis.claims import VERDICTS, claims_table
from geomkit.plots.certificates import plot_certificate
from geomkit.plots.conflict import plot_conflict, plot_conflict_examples
from geomkit.plots.one_sample import plot_one_sample
from geomkit.plots.principal_angles import plot_angles
from geomkit.plots.ranks import plot_effective_rank, plot_spectrum_contrast
from geomkit.plots.report import Head, Section, write_report
from geomkit.plots.runs import plot_evaluation, plot_history
from geomkit.plots.spectra import plot_spectrum
from geomkit.plots.themes import drawn_in
from geomkit.screening.screening import Screening
from geomkit.svd.spectrum import Spectrum
from geomkit.utils.display import Result, signed

if TYPE_CHECKING:
    from geomkit.experiments.tour import Tour  # imports transformers, which takes seconds
    from geomkit.training.result import FineTuneResult


def write_result(result: Result, path: str | Path, title: str = "", facts: Mapping[str, str] | None = None) -> Path:
    """Write the report of a result, see :meth:`geomkit.utils.display.Result.report`.

    Args:
        result: The result.
        path: The file to write.
        title: The title of the page; made from the result when left out.
        facts: More facts for the head of the page, such as the command.
    """
    with drawn_in("light"):  # the page itself turns figures dark, where its reader wants that
        page = _page_of(result)
    head = replace(page.head, facts={**page.head.facts, **(facts or {})})
    today = dt.datetime.now(tz=dt.UTC).date()
    return write_report(path, title or page.title, page.sections, date=today, head=head)


class _Page(NamedTuple):
    """The parts of a report."""

    title: str
    head: Head
    sections: list[Section]


def _page_of(result: Result) -> _Page:
    from geomkit.experiments.tour import Tour
    from geomkit.training.result import FineTuneResult

    if isinstance(result, Analysis):
        title = f"Gradient geometry of {result.facts.get('model', 'a model').partition(',')[0]}"
        return _Page(title, Head(result.summary, result.facts), analysis_sections(result))
    if isinstance(result, Tour):
        return _Page("A tour of geomkit", Head(result.summary, result.analysis.facts), tour_sections(result))
    if isinstance(result, FineTuneResult):
        facts = {name: str(value) for name, value in result.settings.get("training", {}).items()}
        return _Page("A fine-tune", Head((f"{result}.",), facts), fine_tune_sections(result))
    if isinstance(result, Screening):
        return _Page("A screen of training rows", Head((f"{result}.",)), screening_sections(result))
    words = re.sub(r"(?<=[a-z])([A-Z])", lambda match: f" {match[1].lower()}", type(result).__name__)
    figures = (result.plot(),) if hasattr(result, "plot") else ()
    section = Section("Numbers", "", figures, (result.shown_frame(),))
    return _Page(words, Head(tuple(str(result).splitlines()[:1])), [section])


def fine_tune_sections(result: "FineTuneResult") -> list[Section]:
    """Return the sections of a fine-tune: the loss, and under SPF the protection and its certificate."""
    import pandas as pd

    sections = [
        Section("The loss during training", "", (plot_history({"fine-tune": result}),), (result.shown_frame(),))
    ]
    if result.certificate:
        protection = pd.DataFrame(result.settings.get("protection", {}).items(), columns=["setting", "value"])
        sections += [
            Section("How it was protected", "", (), (protection,)),
            Section(
                "Did the projection hold?",
                f"{result.certificate}.\n\nThe table has the steps nearest to raising the loss on the anchors.",
                (plot_certificate(result.certificate),),
                (result.certificate.shown_frame(),),
            ),
        ]
    return sections


_TOP_ROWS = 40
"""Number of rows in the report of a screen."""


def analysis_sections(analysis: Analysis) -> list[Section]:
    """Return the sections of an analysis: the refusals, the claims, and a section for each of the three questions."""
    return [_alignment(analysis), _claims(analysis), _spectra(analysis), _conflict(analysis), _one_sample(analysis)]


def _alignment(analysis: Analysis) -> Section:
    alignment = analysis.alignment
    text = f"{alignment}."
    if alignment.refuses is False:
        text += (
            " A gradient on forbidden requests and refusals is a safety gradient only in a model that refuses: the "
            "numbers below are about these texts and this architecture, and each verdict is marked so. Align the model "
            "first, or take another one."
        )
    elif alignment.caveat:
        text += " More safety requests, or requests that the model surely refuses, would tell; each verdict is marked."
    elif alignment.refusal is None:
        text += " Without the model's own answers it cannot be told whether the numbers below are about alignment."
    return Section("Is the model aligned at all?", text, (), (analysis.numbers("loss"),))


def _claims(analysis: Analysis) -> Section:
    text = (
        "What the paper claims of gradients, with and without a control: benign requests that get the safety set's own "
        f"responses, so that only what is forbidden is missing. {VERDICTS}."
    )
    if analysis.caution:
        text += f"\n\nCaution: {analysis.caution}."
    return Section("What survives its controls?", text, (), (claims_table(analysis.claims()),))


def _spectra(analysis: Analysis) -> Section:
    names, spectra = tuple(analysis.spectra), tuple(analysis.spectra.values())
    sentences = " ".join(_rank_sentence(name, spectrum) for name, spectrum in analysis.spectra.items())
    text = (
        f"Spectra of the mean gradients of {len(analysis.safety.layers)} weight matrices, all sides cut to the same "
        f"tokens ({analysis.tokens} in the median layer): with fewer tokens any gradient has a lower rank. The null "
        "keeps each gradient's tokens, inputs and token weights and randomises the output directions.\n\n"
        f"{sentences} What a gradient shows below its own null may still come from words that its examples repeat, as "
        "it does in a model that has learnt nothing; what is about safety is the difference to the control.\n\n"
        f"{analysis.rank_contrast('control')}. {analysis.rank_contrast('utility')}.\n\n"
        "The last figure shows how many dimensions more or fewer the gradients of the safety examples span than those "
        "of the control, in each decoder layer and outside the layers. The parameters with the largest gradients "
        "decide over the span of the whole model, and these can differ from set to set."
    )
    spans = analysis.span_contrast("control", by="layer")
    figures = (
        plot_spectrum(*spectra, names=names),
        plot_effective_rank(*spectra, names=names),
        plot_spectrum_contrast(spans),
    )
    return Section("Are safety gradients of low rank?", text, figures, (analysis.numbers("low rank?"),))


def _rank_sentence(name: str, spectrum: Spectrum) -> str:
    frame = spectrum.to_frame()
    ranks = frame[frame["statistic"] == "effective_rank"]
    below = int((ranks["value"] < ranks["null"]).sum())
    low, high = spectrum.interval("effective_rank")
    return (
        f"{name.capitalize()}: mean effective rank {spectrum.mean('effective_rank'):.1f} [{low:.1f}, {high:.1f}] "
        f"against {spectrum.null_mean('effective_rank'):.1f} under the null, below which it is in {below} of "
        f"{len(ranks)} matrices."
    )


def _conflict(analysis: Analysis) -> Section:
    conflict = analysis.conflict
    null_low, null_high = conflict.null_interval
    text = (
        f"The cosine of the expected gradients is {conflict.corrected:+.3f} {signed(conflict.interval)}; at equal "
        f"weights of examples and parameters it is {conflict.equal_weights.corrected:+.3f} "
        f"{signed(conflict.equal_weights.interval)}. Untrained models conflict too: what counts is the difference to "
        f"the control. {conflict.contrast}.\n\n"
        f"The cosine of the two mean gradients is {conflict.cosine:+.3f}; with the labels safety and utility shuffled "
        f"it lies between {null_low:+.3f} and {null_high:+.3f} (p = {conflict.p_value:.3g}). That tells whether the "
        "two sets differ, not whether they conflict.\n\n"
        f"{conflict.negative} of the utility examples point against the mean safety gradient; of unrelated gradients, "
        "half would. The principal angles below stand beside what random subspaces show; shared inputs alone bring "
        "subspaces closer than that."
    )
    figures = (plot_conflict(conflict), plot_conflict_examples(conflict), plot_angles(analysis.angles))
    return Section("Do safety and utility conflict?", text, figures, (analysis.numbers("conflict?"),))


def _one_sample(analysis: Analysis) -> Section:
    study = analysis.one_sample
    text = (
        f"{str(study).capitalize()}.\n\nA safety example is compared with the mean of the others, never with itself. "
        "The controls are benign requests with the same responses: what they reach too is due to the responses' "
        "wording and to shared inputs, not to what is forbidden."
    )
    return Section("Is one safety example enough?", text, (plot_one_sample(study),), (analysis.numbers("one sample?"),))


def screening_sections(screening: Screening) -> list[Section]:
    """Return the sections of a screen: what was found, and how far to trust it."""
    table = screening.to_frame().sort_values("score", ascending=False, ignore_index=True).head(_TOP_ROWS)
    columns = ["row", "score", "p", "q", "cosine", "share", "loss", "loss_tokens", "carried_by"]
    found = (
        f"{screening}.\n\nThe score of a row is the first-order change of the mean loss on the safety examples for a "
        "step on this row alone, as a distance from null rows of as many scored tokens."
    )
    trust = (
        "The p-values hold for rows that are like the rows of the null in format and language; rows of another kind "
        "may stand out as a whole. Rows that do harm only together, such as a backdoor made of benign rows, are not "
        "seen. The share is that of the row's gradient in the leading ten left singular directions of each matrix of "
        "the safety gradient."
    )
    return [
        Section(screening.question, found, (screening.plot(),), (table[columns],)),
        Section("How far to trust it", trust),
    ]


def tour_sections(tour: "Tour") -> list[Section]:
    """Return the sections of the tour: the outcome of fine-tuning, the sections of the analysis, the certificates."""
    outcome = Section(
        "Fine-tuning with and without SPF",
        "Held-out forbidden requests refused, benign requests refused, and exact answers on the task learnt (on the "
        "old skills where there is none), with 95 % Wilson intervals in brackets. The last column is the certificate: "
        "how many optimizer steps raised the safety loss L_s to first order, beyond rounding.",
        (plot_evaluation(tour.evaluations()),),
        (tour.to_frame(),),
    )
    runs = {f"{arm.name}, {arm.scenario.name}": arm.result for arm in tour.arms}
    certificates = (plot_certificate(run.certificate, name) for name, run in runs.items() if run.certificate)
    proof = Section(
        "Did the projection hold?",
        "Each step's change of the safety loss on its anchors, to first order, measured on the weights before and "
        "after the step. Plain fine-tuning is measured in the same way, with nothing projected.",
        (*certificates, plot_history(runs)),
    )
    return [outcome, *analysis_sections(tour.analysis), proof]
