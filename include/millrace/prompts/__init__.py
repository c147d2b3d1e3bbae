"""Prompts: their versions, and a study that looks for a better one on development questions."""
