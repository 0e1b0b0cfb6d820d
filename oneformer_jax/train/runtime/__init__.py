"""The run as a process on machines: who takes part, when it must stop, where it writes."""
