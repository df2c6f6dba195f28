"""Screening of training rows for what they would do to the loss on refusals, before anything is trained.

Reading order: ``reference`` → ``row_scores`` (with ``parts``, which an interrupted screen resumes from) → ``screening``
(the result, with its null) → ``screen``.
"""
