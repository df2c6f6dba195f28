"""What every other room uses and nothing of the field.

Argument checks, tables, files, saving, precision, seeding, and the link from results to figures.
"""
