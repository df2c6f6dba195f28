"""The forms of a gradient: factors over tokens, rows that were looked up, a tensor, and a sum of these."""

from geomkit.forms.dense import DenseGradient
from geomkit.forms.factored import FactoredGradient
from geomkit.forms.indexed import IndexedGradient
from geomkit.forms.summed import SumGradient

__all__ = ["DenseGradient", "FactoredGradient", "IndexedGradient", "SumGradient"]
