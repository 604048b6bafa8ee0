"""Hydra's YAML files. Imported as ``infini_bench.conf``."""

if "." not in __name__:
    raise ImportError("import infini_bench.conf, not conf: the name conf belongs to anyone")
