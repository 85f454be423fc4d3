"""Arrays, trees of them, and random numbers: what every layer is written with."""
