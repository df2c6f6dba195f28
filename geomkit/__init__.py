"""geomkit: the gradient geometry of safety-aligned LLMs, measured with nulls and intervals, preserved with SPF.

The way of the data is the order of a notebook::

    examples → gradients → spectrum, subspace, angles, conflict → SPF → fine-tune → evaluation → figures

Everything public is one import away (``import geomkit as gk``); what it needs is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from geomkit.version import __version__ as __version__

_ROOMS = {
    "GeometryCallback": "tracking",
    "GeomkitError": "errors",
    "Probe": "probes",
    "SPF": "spf",
    "SPFCallback": "spf.callback",
    "analyze": "probes",
    "anchor_curve": "anchor_counts",
    "check_collection": "collection.checks",
    "collect_gradients": "collect",
    "compare_spectra": "contrasts",
    "conflict": "correlation",
    "conflict_directions": "directions",
    "conflict_of_grams": "correlation",
    "describe": "collection.plan",
    "evaluate": "evaluation",
    "finetune": "finetuning",
    "generate": "evaluation",
    "gradient_map": "maps",
    "load_examples": "data",
    "load_gradients": "storage",
    "load_model": "models",
    "load_organism": "organism",
    "load_results": "experiments.results",
    "load_subspace": "storage",
    "match_tokens": "token_matching",
    "measure_samples": "measuring",
    "noise_floor": "noise",
    "one_sample_study": "onesample",
    "overlaps": "similarity",
    "own_refusals": "spf",
    "own_responses": "control_sets",
    "principal_angles": "angles",
    "random_tokens": "control_sets",
    "run_experiments": "experiments.running",
    "sample_grams": "grams",
    "shipped_examples": "data",
    "shuffled_pairs": "control_sets",
    "span": "spans",
    "spectrum": "spectra",
    "subspace": "subspaces",
    "subspace_energy": "subspace_energies",
    "token_conflict": "attribution",
    "track": "tracking",
    "untrained": "models",
    "with_responses": "control_sets",
}

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
    "conflict_of_grams",
    "describe",
    "evaluate",
    "finetune",
    "generate",
    "gradient_map",
    "load_examples",
    "load_gradients",
    "load_model",
    "load_organism",
    "load_results",
    "load_subspace",
    "match_tokens",
    "measure_samples",
    "noise_floor",
    "one_sample_study",
    "overlaps",
    "own_refusals",
    "own_responses",
    "principal_angles",
    "random_tokens",
    "run_experiments",
    "sample_grams",
    "shipped_examples",
    "shuffled_pairs",
    "span",
    "spectrum",
    "subspace",
    "subspace_energy",
    "token_conflict",
    "track",
    "untrained",
    "with_responses",
]

if TYPE_CHECKING:
    from geomkit.anchor_counts import anchor_curve
    from geomkit.angles import principal_angles
    from geomkit.attribution import token_conflict
    from geomkit.collect import collect_gradients
    from geomkit.collection.checks import check_collection
    from geomkit.collection.plan import describe
    from geomkit.contrasts import compare_spectra
    from geomkit.control_sets import own_responses, random_tokens, shuffled_pairs, with_responses
    from geomkit.correlation import conflict, conflict_of_grams
    from geomkit.data import load_examples, shipped_examples
    from geomkit.directions import conflict_directions
    from geomkit.errors import GeomkitError
    from geomkit.evaluation import evaluate, generate
    from geomkit.experiments.results import load_results
    from geomkit.experiments.running import run_experiments
    from geomkit.finetuning import finetune
    from geomkit.grams import sample_grams
    from geomkit.maps import gradient_map
    from geomkit.measuring import measure_samples
    from geomkit.models import load_model, untrained
    from geomkit.noise import noise_floor
    from geomkit.onesample import one_sample_study
    from geomkit.organism import load_organism
    from geomkit.probes import Probe, analyze
    from geomkit.similarity import overlaps
    from geomkit.spans import span
    from geomkit.spectra import spectrum
    from geomkit.spf import SPF, own_refusals
    from geomkit.spf.callback import SPFCallback
    from geomkit.storage import load_gradients, load_subspace
    from geomkit.subspace_energies import subspace_energy
    from geomkit.subspaces import subspace
    from geomkit.token_matching import match_tokens
    from geomkit.tracking import GeometryCallback, track


def __getattr__(name: str) -> object:
    if name in {"measures", "plots"}:  # rooms that are used by their name
        return import_module(f"geomkit.{name}")
    if name not in _ROOMS:
        raise AttributeError(f"module 'geomkit' has no attribute '{name}'; it has {', '.join(__all__)}")
    value = getattr(import_module(f"geomkit.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
