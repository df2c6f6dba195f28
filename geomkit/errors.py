"""The exceptions of geomkit; every message gives what was expected, what was found and what to do."""


class GeomkitError(Exception):
    """Base class of all errors that geomkit raises on purpose; the command line prints them as one line."""


class DataError(GeomkitError, ValueError):
    """Raised for examples, tokenizers, files, folders and training arguments that cannot be used as given."""


class CollectionError(GeomkitError, RuntimeError):
    """Raised when gradients cannot be collected exactly, such as after a loss that is not finite."""


class GeometryError(GeomkitError, ValueError):
    """Raised for gradients that cannot be compared, and for ranks or other settings that they do not allow."""


class SPFError(GeomkitError, RuntimeError):
    """Raised when SPF cannot be attached to an optimizer, or its constraint does not hold after a step."""
