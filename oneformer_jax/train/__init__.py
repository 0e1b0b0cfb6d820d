"""The training loop and everything that touches devices or disk."""
