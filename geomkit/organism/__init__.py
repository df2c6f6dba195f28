"""The model organism: its world of requests, how it was built, and loading it."""

from geomkit.organism.load import STAGES, load_organism
from geomkit.organism.scenarios import SCENARIOS, Scenario

__all__ = ["SCENARIOS", "STAGES", "Scenario", "load_organism"]
