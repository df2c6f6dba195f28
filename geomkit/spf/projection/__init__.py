"""The projection of one step.

Reading order: ``protection`` of each block; ``reading`` before and after the step; ``removal`` of a subspace;
``nearest`` step that satisfies the constraints; ``corrections`` of the weights.
"""
