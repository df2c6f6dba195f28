"""Experiments on the organism: scenarios × arms × strengths × seeds, what each does, and what is known from that.

Reading order: ``grid`` says what is run; ``organism`` on what; ``methods`` how an arm fine-tunes, with the published
``rivals``; ``outcomes`` and ``attacks`` (with ``gcg``) say what a model does afterwards; ``cells`` runs one cell,
``running`` all; ``results`` compares. ``tour`` runs every stage once.
"""
