"""Description of a collection beforehand: ``describe`` makes a ``description``, with sizes from ``memory``."""
