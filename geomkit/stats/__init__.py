"""Intervals and tests on plain arrays: jackknife, ratio intervals, permutation, false discovery, proportions.

Nothing here knows a gradient or a model; every function takes and returns numpy arrays and numbers.
"""
