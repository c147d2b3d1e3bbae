"""Releases: immutable data that turns a question into an answer, how they are registered, loaded and assigned."""
