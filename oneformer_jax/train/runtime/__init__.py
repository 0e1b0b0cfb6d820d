"""The run as a process on machines: its peers, its end by a signal, its folder."""
