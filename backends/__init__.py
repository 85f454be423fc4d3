"""Array libraries behind one protocol, one per file: the only place that imports one."""
