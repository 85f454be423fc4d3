"""Texts on the host: characters to ids and back, corpora of memory-mapped ids, batches of windows."""
