"""From a few users to all, or back: what users showed, what it proves, and what is decided on it."""
