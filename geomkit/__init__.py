"""geomkit: the gradient geometry of safety-aligned LLMs, measured with nulls and intervals, preserved with SPF.

The way of the data is the order of a notebook::

    examples → gradients → spectrum, subspace, angles, conflict → SPF → fine-tune → evaluation → figures

Every public name is listed in ``__init__.pyi`` and imported when it is first used, so ``import geomkit as gk`` is fast.
"""

import lazy_loader

from geomkit.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
