"""infini-bench: Infini-attention reproduced, explained and beaten (arXiv 2404.07143)."""

__version__ = "0.1.0"
