"""Agreement of single examples' gradients with the gradient of all: direction, subspace, and the number that is enough.

Reading order: ``pooled`` → ``leave_one_out`` → ``study`` with its ``results`` → ``anchor_curve``, ``overlaps``,
``gradient_map``.
"""
