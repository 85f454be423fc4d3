"""Models of other projects, read and written in those projects' own files."""
