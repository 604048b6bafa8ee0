"""infini-bench: Infini-attention reproduced, explained and beaten (arXiv 2404.07143).

Importing it makes the Auto classes of transformers know our models, and loads nothing.
"""

from infini_bench.registry import register

__version__ = "0.1.0"

register()
