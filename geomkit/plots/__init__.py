"""One function per figure: each lays out a finished result and returns a plotly figure, never shows it.

The figures share one template, registered with plotly as ``"geomkit"``, and fixed colours for the safety side, the
utility side, the null, plain fine-tuning and SPF.
"""

from geomkit.plots.along_training import plot_certificate_outcome, plot_drift, plot_refusal_during_training
from geomkit.plots.certificates import plot_certificate, plot_certificate_blocks, plot_certificates
from geomkit.plots.conflict import plot_conflict, plot_conflict_examples
from geomkit.plots.directions import plot_conflict_directions
from geomkit.plots.noise_floor import plot_noise_floor
from geomkit.plots.one_sample import plot_anchor_curve, plot_gradient_map, plot_overlaps
from geomkit.plots.outcomes import plot_attacks, plot_breakdown, plot_frontier
from geomkit.plots.principal_angles import plot_angles, plot_one_sample
from geomkit.plots.ranks import plot_effective_rank, plot_spectrum_contrast
from geomkit.plots.runs import plot_evaluation, plot_history
from geomkit.plots.spectra import plot_cer, plot_spectrum
from geomkit.plots.style import COLOURS, TEMPLATE
from geomkit.plots.tokens import plot_token_conflict
from geomkit.plots.trajectory import plot_trajectory

__all__ = [
    "COLOURS",
    "TEMPLATE",
    "plot_anchor_curve",
    "plot_angles",
    "plot_attacks",
    "plot_breakdown",
    "plot_cer",
    "plot_certificate",
    "plot_certificate_blocks",
    "plot_certificate_outcome",
    "plot_certificates",
    "plot_conflict",
    "plot_conflict_directions",
    "plot_conflict_examples",
    "plot_drift",
    "plot_effective_rank",
    "plot_evaluation",
    "plot_frontier",
    "plot_gradient_map",
    "plot_history",
    "plot_noise_floor",
    "plot_one_sample",
    "plot_overlaps",
    "plot_refusal_during_training",
    "plot_spectrum",
    "plot_spectrum_contrast",
    "plot_token_conflict",
    "plot_trajectory",
]
