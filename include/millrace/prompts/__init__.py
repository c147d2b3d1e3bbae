"""Prompts as versions in the MLflow prompt registry: list, compare, try, and search for a better one (Optuna)."""
