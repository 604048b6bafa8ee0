"""Feature maps sigma of the compressive memory (Eq. 7-9). All are elementwise and non-negative."""

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


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"elu1": elu1, "relu2": relu2, "exp": exp}
