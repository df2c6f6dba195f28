"""Utilities that all other packages use, and that do not depend on gradients or models.

In reading order: ``options`` (the range of every numeric option), ``arguments`` (checks of arguments), ``display``
(HTML, tables and numbers as text), ``readable`` (tables for people), ``terminal`` (texts on a terminal), ``progress``
(bars), ``figures`` (the link from results to their figures), ``files`` (atomic writing and JSON), ``field_types``
(types of values that were read), ``saved_files`` (the file format of a save), ``saving`` (results to that format and
back), ``locks`` (of threads), ``watchdog`` (a time limit), ``free_memory``, ``precision``, ``seeding`` and ``workers``
(processes that divide the examples).
"""
