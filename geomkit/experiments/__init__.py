"""Experiments on model organisms: fine-tunes by scenario, arm, strength and seed, and their results.

An *arm* is a way to fine-tune, a *scenario* a training set with its settings, a *cell* a single fine-tune, and a *grid*
the cells of an experiment.

Reading order: ``organism`` (the small model and its example sets), ``english`` (an aligned SmolLM2 and its example
sets) and ``organisms`` (both by name) → ``task`` and ``methods`` with the published ``rivals`` (the fine-tunes) →
``outcomes`` and ``attacks`` with ``gcg`` (the evaluation afterwards) → ``grid`` (the declaration of cells) → ``cells``
and ``running`` (the runs) → ``records``, ``comparison`` and ``results`` (the results). ``insights`` measures the
paper's claims on an organism, ``screening`` is the study of the screen, and ``tour`` runs every stage of geomkit once.
"""
