"""Experiments on the organism: scenarios × arms × strengths × seeds, what each does, and what is known from that.

In reading order: :mod:`.grid` says what is run, :mod:`.organisms` on what, :mod:`.methods` how an arm fine-tunes, with
the published rivals in :mod:`.rivals`, and :mod:`.options` which options an arm has; :mod:`.outcomes` and
:mod:`.attacks` (with :mod:`.gcg`) measure what a model does afterwards, :mod:`.along` while it is trained;
:mod:`.cells` runs one cell and keeps it as one of :mod:`.records`, :mod:`.running` runs all; :mod:`.results` compares,
with :mod:`.intervals`.
"""
