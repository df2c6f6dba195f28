"""The study of the screen: does it find planted rows, does its null hold, and does a screened set keep the refusals?

Reading order: ``row_sources`` → ``cases`` → ``rivals`` → ``row_measures`` (scores of rows) and ``measures`` (how well
scores find planted rows) → ``fine_tunes`` on the rows that are left → ``study``, which runs all → ``results``, which
the notebook shows.
"""
