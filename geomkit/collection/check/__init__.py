"""Check of a collection: ``check`` asks ``questions`` about a ``subject``, and returns ``verdicts``."""
