"""What geomkit raises: each message says what was expected, what was found and what to do."""


class GeomkitError(Exception):
    """Base of every error that geomkit raises on purpose; the command line prints it as one line."""


class DataError(GeomkitError, ValueError):
    """Examples, a tokenizer or a chat template that cannot be used as given."""


class CollectionError(GeomkitError, RuntimeError):
    """Gradients that could not be collected exactly: a non-finite loss, a parameter nobody can see."""


class GeometryError(GeomkitError, ValueError):
    """Gradient sets that cannot be compared, or a rank that the data does not have."""


class SPFError(GeomkitError, RuntimeError):
    """A projection that cannot be attached, or whose constraint does not hold after a step."""
