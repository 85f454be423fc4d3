"""Inspecting a model: every array of a forward and backward pass."""
