from . import plots
from .analysis.probe import Probe, analyze
from .analysis.tracking import GeometryCallback
from .collection.check.check import check_collection
from .collection.collect import collect_gradients
from .collection.sample_grams import sample_grams
from .collection.sample_measures import measure_samples
from .correlation.conflict import conflict
from .correlation.conflict_directions import conflict_directions
from .correlation.token_conflict import token_conflict
from .errors import GeomkitError
from .experiments.organisms import load_organism
from .gradients.storage import load_gradients
from .inputs.control_sets import with_responses
from .inputs.examples import load_examples
from .inputs.models import load_model
from .inputs.parameters import select
from .inputs.tokens import encode
from .planning.describe import describe
from .plots.explorer import explore
from .screening.screen import screen
from .spf.callback import SPFCallback
from .spf.settings import SPF
from .svd.example_span import span
from .svd.noise_floor import noise_floor
from .svd.one_sample.anchor_curve import anchor_curve
from .svd.one_sample.gradient_map import gradient_map
from .svd.one_sample.overlaps import overlaps
from .svd.one_sample.study import one_sample_study
from .svd.principal_angles import principal_angles
from .svd.spectrum import spectrum
from .svd.spectrum_contrast import compare_spectra
from .svd.subspaces import subspace
from .svd.token_matching import match_tokens
from .training.evaluate import evaluate
from .training.finetune import finetune
from .training.responses import own_refusals

__version__: str

__all__ = [
    "SPF",
    "GeometryCallback",
    "GeomkitError",
    "Probe",
    "SPFCallback",
    "analyze",
    "anchor_curve",
    "check_collection",
    "collect_gradients",
    "compare_spectra",
    "conflict",
    "conflict_directions",
    "describe",
    "encode",
    "evaluate",
    "explore",
    "finetune",
    "gradient_map",
    "load_examples",
    "load_gradients",
    "load_model",
    "load_organism",
    "match_tokens",
    "measure_samples",
    "noise_floor",
    "one_sample_study",
    "overlaps",
    "own_refusals",
    "plots",
    "principal_angles",
    "sample_grams",
    "screen",
    "select",
    "span",
    "spectrum",
    "subspace",
    "token_conflict",
    "with_responses",
]
