"""The size, time and memory of a run, before it starts."""
