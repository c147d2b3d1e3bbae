"""A release over a table of questions: in batches and as a stream, on Spark."""
