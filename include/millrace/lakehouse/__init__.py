"""What the Lakehouse holds and how it is read and written: declared tables, two engines, one writer a table."""
