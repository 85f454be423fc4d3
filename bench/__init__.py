"""Measurements of baby_xp: time and memory of training steps, beside other libraries. Not installed."""
