"""What keeps dev, staging and prod apart, and what moves between them."""
