"""Utilities that all other packages use, and that do not depend on gradients or models.

In reading order: ``arguments`` (checks of arguments), ``display`` (tables and numbers as text), ``figures`` (the link
from results to their figures), ``files`` (atomic writing), ``saved_files`` (the file format of a save), ``saving``
(results to that format and back), ``precision``, ``seeding`` and ``workers`` (processes that divide the examples).
"""
