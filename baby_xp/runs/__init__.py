"""Runs on disk: the files that belong to one GUID."""
