"""Agreement of gradients of single examples, and of a few examples, with the mean gradient of all.

Reading order: ``pooled`` → ``leave_one_out`` → ``study`` with its ``results`` → ``anchor_curve``, ``overlaps``,
``gradient_map``.
"""
