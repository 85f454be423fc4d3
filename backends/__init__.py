"""Array libraries behind one protocol, one a file: the only place that imports one."""
