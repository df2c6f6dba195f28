"""How gradients are collected: what to watch, one pass over a batch, telling examples apart, and whether to trust it.

The reading order is ``selection`` → ``hooks`` → ``uses`` → ``rows`` → ``passes`` → ``separation`` → ``streaming``;
``plan`` says beforehand what a collection needs, ``checks`` whether it is right on a model: it puts ``questions`` about
a ``subject`` and brings back ``verdicts``.
"""
