"""Several seeds' values of a metric as one: a mean, and a 95 % Student interval that the metric can have."""

from __future__ import annotations

import math
from statistics import NormalDist, mean, stdev

from infini_bench.report.gates import KINDS

# Student's t at 97.5 % for 1, 2 ... 10 degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# Above 0, and as likely half as twice their size: a geometric mean, and Student's interval on logarithms.
# A perplexity's is then the exponential of the mean loss.
GEOMETRIC = (
    *("token_ppl", "word_ppl", "grad_norm_mean", "grad_norm_max", "gradient_norm", "gradient_share"),
    *("tokens_per_s", "train_tokens_per_s", "gpu_seconds"),
)
SIGNED = (-math.inf, math.inf)
BOUNDS = {  # which an interval cannot leave; those of all other metrics are 0 and infinity
    **dict.fromkeys((*KINDS, "local_layers"), (0.0, 100.0)),
    **dict.fromkeys(("gate", "head_gate", "write_strength"), (0.0, 1.0)),
    **{"cosine": (-1.0, 1.0), "gain": SIGNED},
}
LOGARITHMS = "the mean of {} over seeds is geometric, with Student's interval on logarithms"


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of at least two seeds' values and its Student interval."""
    degrees = len(values) - 1
    z = NormalDist().inv_cdf(0.975)
    # beyond the table: the Cornish-Fisher expansion, right to 0.003 there
    beyond = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    t = STUDENT[degrees - 1] if degrees <= len(STUDENT) else beyond
    middle, spread = mean(values), t * stdev(values) / math.sqrt(len(values))
    return middle, middle - spread, middle + spread


def over_seeds(metric: str, values: list[float]) -> tuple[float, float, float]:
    """Mean of at least two seeds' values of a metric, and its interval: see GEOMETRIC and BOUNDS.

    A gradient that a seed does not have at all is 0, which has no logarithm: its mean is arithmetic.
    """
    if metric in GEOMETRIC and min(values) > 0:
        middle, low, high = map(math.exp, mean_interval([math.log(value) for value in values]))
        return middle, low, high
    middle, low, high = mean_interval(values)
    least, most = BOUNDS.get(metric, (0.0, math.inf))
    return middle, max(low, least), min(high, most)
