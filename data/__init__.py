"""Built-in texts: their generators, and the catalog of texts that are downloaded."""
