"""geomkit: the gradient geometry of safety-aligned LLMs, measured with nulls and intervals, preserved with SPF.

The way of the data is the order of a notebook::

    examples → gradients → spectrum, subspace, angles, conflict → SPF → fine-tune → evaluation → figures

Every public name is listed in ``__init__.pyi`` and imported when it is first used, so ``import geomkit as gk`` is fast.
"""

import sys
from collections.abc import Sequence

import lazy_loader

from geomkit.version import __version__ as __version__

_attribute, _names, __all__ = lazy_loader.attach_stub(__name__, __file__)

_FORMER_NAMES = {
    "conflict_of_grams": "conflict(…, across=…)",
    "generate": "geomkit.training.responses.generate",
    "load_results": "geomkit.experiments.results.load_results",
    "load_subspace": "geomkit.svd.subspaces.load_subspace",
    "measures": "geomkit.collection.measures",
    "own_responses": "geomkit.training.responses.own_responses",
    "random_tokens": "geomkit.inputs.control_sets.random_tokens",
    "run_experiments": "geomkit.experiments.running.run_experiments",
    "shipped_examples": "geomkit.inputs.examples.shipped_examples",
    "shuffled_pairs": "geomkit.inputs.control_sets.shuffled_pairs",
    "track": "geomkit.analysis.tracking.track",
    "untrained": "geomkit.inputs.models.untrained",
}
"""Names that were at the root in version 0.1.0, and where they are now."""


_COMPLETER = "jedi.inference.compiled.access"
"""The module that reads attributes for IPython's completion, which only wants to know whether each is a function.

Before torch is imported, the answer would take many seconds; without it, completion shows the names all the same.
"""


def __getattr__(name: str) -> object:
    if name in _FORMER_NAMES:
        raise AttributeError(f"geomkit.{name} is {_FORMER_NAMES[name]} since version 0.2.0")
    if "torch" not in sys.modules and sys._getframe(1).f_globals.get("__name__") == _COMPLETER:  # noqa: SLF001
        raise AttributeError(f"geomkit.{name} is not imported to complete its name")
    return _attribute(name)


def __dir__() -> Sequence[str]:
    return [*_names(), "__version__"]
