"""The version of geomkit, in a module without imports, so that every module can import it."""

__version__ = "0.2.0"
