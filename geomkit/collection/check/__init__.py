"""Check of a collection.

``check`` asks ``questions`` about a ``subject``, compares (``comparing``), and returns ``verdicts``.
"""
