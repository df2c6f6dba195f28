"""geomkit: the gradient geometry of safety-aligned LLMs."""

__version__ = "0.1.0"
