"""What releases do to users, hour by hour: metrics, drift and cost, and what a breach of their bounds asks for."""
