"""The contract of a memory, run on anybody's module: ``infini-bench check``."""
