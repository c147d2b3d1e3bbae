"""What is watched after the rollout: metrics and drift per window, bounds on them, and what everything cost."""
