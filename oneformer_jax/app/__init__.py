"""The program: its command line, its modes, and the way from a config to data."""
