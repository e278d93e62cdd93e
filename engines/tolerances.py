"""How far two computations of the same thing may be apart: every bar that the project holds itself to.

Each is by the arithmetic of the graph, fp32 or fp16. A relative L2 is |found - wanted| / |wanted| over a
whole output; dB are the peak signal-to-noise ratio of uint8 pictures, 20 log10(255 / root mean square error).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .spec import Array

# Relative L2 of one output of a net, on the same inputs and weights as the reference. fp32: two correct
# programs differ only by the order of their sums, 1e-7 to 1e-5 on these nets; the commonest mistake,
# tanh-GELU for GELU, is 1e-3, and so is TF32. fp16: a rounding (5e-4) grown tenfold over a hundred layers.
NET_RELATIVE_L2: Mapping[str, float] = {"fp32": 1e-4, "fp16": 5e-3}
# At least this much is allowed where a net's output is rounded to whole numbers, because a value beside a
# half may go to its other side: two layouts of SD 1.5's decoder, 3e-7 apart before rounding, were 1.1e-4
# apart in uint8.
ROUNDED_RELATIVE_L2 = 1e-3
# Two programs of a rounded net may be so many times as far apart as rounding its products took it (relative
# L2, in the package's manifest). A value beside a half goes to its other side, the products behind make more
# of it, and in the end errors are as good as independent: 2^0.5 times.
ROUNDING_TIMES = 1.5
# dB of a picture that one net makes of the same latent. Rounding alone gives 75 where one in a hundred shades
# flips; fp16 as above gives 50.
DECODED_DB: Mapping[str, float] = {"fp32": 60.0, "fp16": 45.0}
# dB of a whole picture of the same prompt and seed: differences grow from step to step. All pixels off by one
# shade are 48.1 dB; pictures of other seeds came to 45 dB where they were small and unguided.
PICTURE_DB: Mapping[str, float] = {"fp32": 48.0, "fp16": 40.0}
# The same two of a UNet in fewer bits, by format, computed as the graph says: relative L2 over all calls of
# a picture, and dB of a picture drawn with it. What is worse is not offered. Published recipes keep 25 dB in
# eight bits and 17 to 23 in four, where a picture is another one, and as good. "bf16" is of any package that
# is computed in bfloat16: a rounding (2e-3) grown tenfold.
BF16 = "bf16"
QUANTISED_RELATIVE_L2: Mapping[str, float] = {"int8": 3e-2, "fp8": 5e-2, "int4": 1e-1, BF16: 2e-2}
QUANTISED_PICTURE_DB: Mapping[str, float] = {"int8": 25.0, "fp8": 25.0, "int4": 20.0, BF16: 25.0}


def relative_l2(found: Array, wanted: Array) -> float:
    """|found - wanted| / |wanted| in float64; 0 where both are 0."""
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    size = float(np.linalg.norm(b))
    difference = float(np.linalg.norm(a - b))
    return difference / (size or 1.0)


def decibels(found: Array, wanted: Array) -> float:
    """The peak signal-to-noise ratio of two uint8 pictures, in dB; infinite where they are equal."""
    error = np.asarray(found, np.float64) - np.asarray(wanted, np.float64)
    mean = float((error**2).mean())
    return 10 * math.log10(255**2 / mean) if mean else math.inf
