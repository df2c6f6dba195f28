"""Confidence intervals and significance tests on plain arrays, without any gradient or model.

Reading order: ``jackknife`` (intervals of any smooth statistic) → ``ratio`` (Fieller intervals of a quotient, such as a
cosine) → ``pair_means`` (means over pairs of examples) → ``permutation`` (relabelled and sign-flipped examples) →
``proportions`` (Wilson intervals of counts) → ``multiple_testing`` (false discovery rate of many p-values);
``conditional_null`` (p-values against a null that depends on the length) and ``means`` (of numbers per prompt).
"""
