"""Millrace runs the whole life of LLM applications: documents and feedback in, better releases out.

The rooms and the direction in which they may import each other are drawn in the README.
"""

FORMAT_VERSION = 1
"""Version of what is on disk: home, tables, manifests and event records."""
