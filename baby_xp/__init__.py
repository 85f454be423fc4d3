"""Baby language models from scratch: every forward and backward pass explicit, one text for every backend."""
