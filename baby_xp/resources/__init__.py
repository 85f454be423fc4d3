"""What a run needs of a machine, counted, and what the machine has."""
