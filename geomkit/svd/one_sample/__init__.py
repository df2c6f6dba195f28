"""How far the gradient of one example stands for the gradient of all: direction, subspace, and how many are enough.

Reading order: ``leave_one_out`` → ``study`` with its ``results`` → ``anchor_curve``, ``overlaps``, ``gradient_map``.
"""
