"""What holds for an environment as a whole, keeps dev, staging and prod apart, and moves between them."""
