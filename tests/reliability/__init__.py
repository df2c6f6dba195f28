"""Faults, bad input and attacks: what is promised in CONTRIBUTING.md, one trial a test."""
