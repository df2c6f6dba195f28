"""One function per figure: each lays out a finished result and returns a plotly figure, never shows it.

The figures share one template, registered with plotly as ``"geomkit"``, and fixed colours for the safety side, the
utility side, the null, plain fine-tuning and SPF.
"""

from geomkit.plots._anchor_counts import plot_anchor_curve
from geomkit.plots._certificates import plot_certificate, plot_certificate_blocks, plot_certificates
from geomkit.plots._conflicts import plot_conflict, plot_conflict_examples
from geomkit.plots._contrasts import plot_spectrum_contrast
from geomkit.plots._directions import plot_conflict_directions
from geomkit.plots._maps import plot_gradient_map
from geomkit.plots._noise import plot_noise_floor
from geomkit.plots._outcomes import plot_attacks, plot_breakdown, plot_frontier
from geomkit.plots._overlaps import plot_overlaps
from geomkit.plots._profiles import plot_cer, plot_spectrum
from geomkit.plots._ranks import plot_effective_rank
from geomkit.plots._runs import plot_evaluation, plot_history
from geomkit.plots._style import COLOURS, TEMPLATE
from geomkit.plots._subspaces import plot_angles, plot_one_sample
from geomkit.plots._tokens import plot_token_conflict
from geomkit.plots._training import plot_certificate_outcome, plot_drift, plot_refusal_along
from geomkit.plots._trajectory import plot_trajectory

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
    "plot_refusal_along",
    "plot_spectrum",
    "plot_spectrum_contrast",
    "plot_token_conflict",
    "plot_trajectory",
]
