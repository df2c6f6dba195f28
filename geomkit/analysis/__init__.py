"""All measurements of gradient geometry in one call, verdicts on the paper's claims, and measurements in training.

Reading order: ``probe`` collects the gradients of three sets → ``analysis`` measures them, with ``parameter_measures``
one parameter at a time → ``headlines`` is the table of its numbers → ``claims`` are the verdicts on them → ``summary``
puts both into tables and sentences; ``alignment`` tells whether the model refuses at all; ``tracking`` repeats a probe
during training or over checkpoints.
"""
