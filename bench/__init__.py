"""Measurements of baby_xp: time and memory of training steps, compared with other libraries. Not installed."""
