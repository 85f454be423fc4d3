"""The resources that a run needs, by counting, and those of the machine."""
