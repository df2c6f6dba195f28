"""The command line: ``geomkit tour``, ``check``, ``analyze``, ``screen``, ``finetune``, ``evaluate``, ``bench``, ….

Reading order: ``main`` (the commands in their order, and errors as one line) → ``options``, ``start``, ``columns``,
``inputs`` and ``outputs``, which the commands share → a module for each command, in the order of ``geomkit --help``:
``tour``, ``check``, ``analyze``, ``screen``, ``finetune``, ``evaluate``, ``compare``, ``bench`` and ``organism``.
"""
