"""The study of the screen: does it find planted rows, does its null hold, and does a screened set keep the refusals?

Reading order: ``row_sources`` → ``cases`` → ``rivals`` → ``study`` (with ``measures``) → ``results``, which the
notebook shows.
"""
