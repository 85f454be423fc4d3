"""A trained model at work: it generates."""
