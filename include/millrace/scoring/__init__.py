"""Scorers: one answer (or one list of hits), one score between 0 and 1."""
