"""Benchmarks of the three operators and of the whole model, beside every peer that is here."""
