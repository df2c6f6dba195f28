"""All measurements at once, and again along training.

Reading order: ``probe`` runs them → ``analysis`` holds the results → ``claims`` judges the paper's claims by them;
``tracking`` repeats them at checkpoints.
"""
