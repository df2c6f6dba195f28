"""SPF: keeping a fine-tuning step from conflicting with safety, and proving that it does.

The way of a step, which is also the order to read in: ``rules`` say what is asked; a ``meter`` runs the ``anchors``
and says what that is in numbers; each of the ``blocks`` of weights gets its ``protection``, whose ``reading`` before
and after the optimizer's step says what the step did; ``plans`` say how to correct it, by a ``removal`` of subspaces
and the ``nearest`` step that satisfies a small quadratic ``programme``. The ``guard`` does all this around
``optimizer.step``, and ``assess`` makes of it the step's entry in the ``certificate``.
"""

from geomkit.spf.anchors import own_refusals
from geomkit.spf.certificate import Certificate
from geomkit.spf.guard import Guard
from geomkit.spf.method import SPF
from geomkit.spf.records import StepRecord
from geomkit.spf.rules import RULES, Rule, rules

__all__ = ["RULES", "SPF", "Certificate", "Guard", "Rule", "StepRecord", "own_refusals", "rules"]
