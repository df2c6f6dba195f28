"""The version of geomkit, alone in its file so that every room may say it."""

__version__ = "0.1.0"
