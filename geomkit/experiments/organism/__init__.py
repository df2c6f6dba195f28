"""The model organism: a small language model built to refuse forbidden requests, on which experiments are cheap.

Reading order: ``grammar`` → ``requests`` and ``skills`` → ``world`` → ``sets`` and ``scenarios``; ``recipe`` and
``build`` train it with ``tokenizer`` and ``training``; ``quality`` and ``card`` say how good it is; ``load`` loads it,
``variants`` builds another from another seed.
"""
