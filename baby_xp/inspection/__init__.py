"""Every array of a model on its way through a prompt."""
