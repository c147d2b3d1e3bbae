"""Millrace runs the whole life of LLM applications: documents and feedback in, better releases out.

The rooms and the direction in which they may import each other are drawn in the README.
"""

FORMAT_VERSION = 2
"""Version of a home and the tables in it. `stack/migration.py` has the steps; manifests and event records, which travel
without a home, count their own."""
