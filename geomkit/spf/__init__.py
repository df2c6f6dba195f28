"""SPF: keeping a fine-tuning step from conflicting with safety, and proving that it does."""

from geomkit.spf.certificate import Certificate
from geomkit.spf.guard import Guard
from geomkit.spf.method import SPF
from geomkit.spf.rules import RULES, Rule

__all__ = ["RULES", "SPF", "Certificate", "Guard", "Rule"]
