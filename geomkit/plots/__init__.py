"""One function per figure: each takes a finished result and returns a plotly figure, which it does not show.

All figures share a theme, light or dark (``theme``), whose templates are registered with plotly as ``"geomkit"`` and
``"geomkit_dark"``, and fixed colours for safety, utility, control and null, plain fine-tuning and SPF. The modules of
figures rest on ``themes`` (colours, templates), ``style`` (looks of series, titles, room), ``labels`` (texts),
``axes``, ``traces``, ``panels`` and ``insets``, and figures of experiments also on ``arms``. ``explorer`` draws the
menus of ``explore`` from what results have to explore (``explored``, ``explorer_values``). ``jupyterlab`` asks for its
theme; ``saving`` writes a figure to a file; ``report`` and ``report_pages`` put figures, tables and text on an HTML
page.
"""

from geomkit.plots.breakdown import plot_breakdown
from geomkit.plots.certificate_blocks import plot_certificate_blocks
from geomkit.plots.certificates import plot_certificate, plot_certificates
from geomkit.plots.conflict import plot_conflict, plot_conflict_examples
from geomkit.plots.directions import plot_conflict_directions
from geomkit.plots.explorer import explore
from geomkit.plots.noise_floor import plot_noise_floor
from geomkit.plots.one_sample import plot_anchor_curve, plot_gradient_map, plot_one_sample, plot_overlaps
from geomkit.plots.outcomes import plot_attacks, plot_frontier
from geomkit.plots.principal_angles import plot_angles
from geomkit.plots.ranks import plot_effective_rank, plot_spectrum_contrast
from geomkit.plots.refusals import plot_refusals
from geomkit.plots.runs import plot_evaluation, plot_history
from geomkit.plots.screening import plot_screening
from geomkit.plots.screening_study import plot_screening_detection, plot_screening_null, plot_screening_outcomes
from geomkit.plots.spectra import plot_cer, plot_spectrum
from geomkit.plots.themes import COLOURS, TEMPLATE, theme
from geomkit.plots.tokens import plot_token_conflict
from geomkit.plots.training_curves import plot_certificate_outcome, plot_drift, plot_refusal_during_training
from geomkit.plots.trajectory import plot_trajectory

__all__ = [  # noqa: RUF022 - grouped by the result that is drawn
    # The look of all figures.
    "COLOURS",
    "TEMPLATE",
    "theme",
    # Any of these results, with menus.
    "explore",
    # Spectrum, one or several.
    "plot_spectrum",
    "plot_cer",
    "plot_effective_rank",
    # SpectrumContrast.
    "plot_spectrum_contrast",
    # NoiseFloor.
    "plot_noise_floor",
    # Angles between two subspaces.
    "plot_angles",
    # OneSample, AnchorCurve, Overlaps and GradientMap, of single examples.
    "plot_one_sample",
    "plot_anchor_curve",
    "plot_overlaps",
    "plot_gradient_map",
    # Conflict.
    "plot_conflict",
    "plot_conflict_examples",
    # ConflictDirections and TokenConflict.
    "plot_conflict_directions",
    "plot_token_conflict",
    # Screening of training rows.
    "plot_screening",
    "plot_screening_detection",
    "plot_screening_null",
    "plot_screening_outcomes",
    # Trajectory of a probe over training.
    "plot_trajectory",
    # Certificate, one or several.
    "plot_certificate",
    "plot_certificate_blocks",
    "plot_certificates",
    # Evaluation and FineTuneResult, one or several.
    "plot_evaluation",
    "plot_history",
    # Results of a grid of experiments.
    "plot_frontier",
    "plot_refusals",
    "plot_breakdown",
    "plot_attacks",
    "plot_refusal_during_training",
    "plot_drift",
    "plot_certificate_outcome",
]
