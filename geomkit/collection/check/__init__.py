"""Whether collection is right on a model: ``check`` asks ``questions`` about a ``subject`` and returns ``verdicts``."""
