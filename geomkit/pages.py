"""What the report pages of an analysis and of the tour say: figures, tables, and sentences made of the numbers."""

from typing import TYPE_CHECKING

from geomkit.plots import (
    plot_angles,
    plot_certificate,
    plot_conflict,
    plot_conflict_examples,
    plot_effective_rank,
    plot_evaluation,
    plot_history,
    plot_one_sample,
    plot_spectrum,
)
from geomkit.report import Section

if TYPE_CHECKING:
    from geomkit.analysis import Analysis
    from geomkit.spectra import Spectrum
    from geomkit.tour import Tour

_NAMES = ("safety", "utility")


def analysis_sections(analysis: "Analysis") -> list[Section]:
    """Lay an analysis out: one section for each of the three questions."""
    return [_spectra(analysis), _conflict(analysis), _one_sample(analysis)]


def _spectra(analysis: "Analysis") -> Section:
    sides = (analysis.safety, analysis.utility)
    text = (
        f"Spectra of the mean gradients of {len(analysis.safety.layers)} weight matrices, both sides cut to the same "
        f"tokens ({analysis.tokens} in the median layer): with fewer tokens any gradient has a lower rank. The null "
        "keeps each gradient's tokens, inputs and token weights and randomises the output directions.\n\n"
        f"{_rank_sentence('Safety', analysis.safety)} {_rank_sentence('Utility', analysis.utility)} What a gradient "
        "shows below its own null is structure; what the null shows too comes from the inputs and the token weights."
    )
    figures = (plot_spectrum(*sides, names=_NAMES), plot_effective_rank(*sides, names=_NAMES))
    return Section("Are safety gradients of low rank?", text, figures, (analysis.to_frame(),))


def _rank_sentence(name: str, side: "Spectrum") -> str:
    frame = side.to_frame()
    ranks = frame[frame["statistic"] == "effective_rank"]
    below = int((ranks["value"] < ranks["null_low"]).sum())
    return (
        f"{name}: mean effective rank {side.mean('effective_rank'):.1f} against {side.null_mean('effective_rank'):.1f} "
        f"under the null, below every draw of it in {below} of {len(ranks)} matrices."
    )


def _conflict(analysis: "Analysis") -> Section:
    found = analysis.conflict
    low, high = found.interval
    if high < 0:
        verdict = "The interval lies below zero: the two sides conflict."
    elif low > 0:
        verdict = "The interval lies above zero: the two sides agree."
    else:
        verdict = "The interval covers zero: these examples show neither conflict nor agreement over all parameters."
    null_low, null_high = found.null_interval
    text = (
        f"The cosine of the expected gradients is {found.corrected:+.3f} [{low:+.3f}, {high:+.3f}]. {verdict}\n\n"
        f"The cosine of the two mean gradients is {found.cosine:+.3f}; with the labels safety and utility shuffled it "
        f"lies between {null_low:+.3f} and {null_high:+.3f} (p = {found.p_value:.3g}). That tells whether the two sets "
        "differ, not whether they conflict.\n\n"
        f"{found.negative} of the utility examples point against the mean safety gradient; of unrelated gradients, "
        "half would. The principal angles below stand beside what random subspaces show; shared inputs alone bring "
        "subspaces closer than that."
    )
    figures = (plot_conflict(found), plot_conflict_examples(found), plot_angles(analysis.angles))
    return Section("Do safety and utility conflict?", text, figures)


def _one_sample(analysis: "Analysis") -> Section:
    study = analysis.one_sample
    text = (
        f"{str(study).capitalize()}.\n\nA safety example is compared with the mean of the others, never with itself. "
        "The controls are benign requests with the same responses: what they reach too is due to the responses' "
        "wording and to shared inputs, not to what is forbidden."
    )
    return Section("Is one safety example enough?", text, (plot_one_sample(study),))


def tour_sections(tour: "Tour") -> list[Section]:
    """Lay the tour out: outcome first, then the three questions, then the certificates."""
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
