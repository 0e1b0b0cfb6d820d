"""The training loop, and its use of devices and disk."""
