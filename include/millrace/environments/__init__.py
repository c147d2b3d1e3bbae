"""What holds for an environment as a whole, beside its applications."""
