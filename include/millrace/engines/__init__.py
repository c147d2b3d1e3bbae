"""What generates text. An engine turns messages into text; it does not know where they came from."""
