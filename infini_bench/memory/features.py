"""Feature maps sigma of the compressive memory (Eq. 7-9): (..., D) -> (..., F), F = D but in WIDTHS.

All are non-negative but GELU, whose normaliser may cross zero: it is here because users ask what happens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def elu1(x: Tensor) -> Tensor:
    """ELU(x) + 1, the paper's choice. Strictly positive."""
    return F.elu(x) + 1


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2. Sparse: a key and a query with disjoint supports do not overlap at all."""
    return F.relu(x).square()


def exp(x: Tensor) -> Tensor:
    """exp(x - 4), bounded at exp(16) so that float32 sums over millions of keys stay finite."""
    return torch.exp((x - 4).clamp(max=16))


def dpfp(x: Tensor, nu: int = 1) -> Tensor:
    """Deterministic parameter-free projection (Schlag et al. 2021, arXiv 2102.11174, Eq. 37): F = 2 nu D.

    Products of neighbours in [relu(x), relu(-x)], rolled by 1 ... nu: sparse, and wider than x.
    """
    parts = torch.cat([F.relu(x), F.relu(-x)], -1)
    return torch.cat([parts * parts.roll(shift, -1) for shift in range(1, nu + 1)], -1)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the D features of each key or query; sums to 1."""
    return torch.softmax(x, -1)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": elu1,
    "relu": F.relu,
    "relu2": relu2,
    "exp": exp,
    "dpfp": dpfp,
    "gelu": F.gelu,
    "softmax": softmax,
}
WIDTHS = {"dpfp": 2}  # F / D
