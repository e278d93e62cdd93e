"""The graphs `step` and `step_masked`: guidance and the sampler's row update, for loops on a device.

They hold no weights and no sampler: the row of the table is one of their inputs (docs/samplers.md).
"""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any, cast

from ...engines import spec

# The arithmetic of `runtime/loop/denoise.py`, guidance included, in the same order, for N pictures and B
# rows of the UNet. Where B = N both halves of `prediction` are the same rows, so u + scale * (c - u) is u to
# the bit. The rescaling's two standard deviations are over equally many values, so their number cancels.
_TEXT = Template("""
<ir_version: 10, opset_import: ["": 23]>
step ($half[B, $channels, h, w] prediction, float[$history, N, $channels, h, w] state,
      float[N, $channels, h, w] noise, float[$row] row$picture)
  => (float[$history, N, $channels, h, w] next_state, $half[B, $channels, h, w] latent)
  <int64[1] zero = {0}, int64[1] one = {1}, int64[1] end = {9223372036854775807},
   int64[3] picture = {2, 3, 4}, float nothing = {0}, float unit = {1}>
{
  $columns = Split <axis = 0, num_outputs = $row> (row)
  y, h1, h2, h3, h4 = Split <axis = 0, num_outputs = $history> (state)
  prediction_f32 = Cast <to = 1> (prediction)
  model = Unsqueeze (prediction_f32, zero)
  n = Shape <start = 1, end = 2> (state)
  n_from_end = Neg (n)
  rows = Shape <start = 0, end = 1> (prediction)

  unconditional = Slice (model, zero, n, one)
  conditional = Slice (model, n_from_end, end, one)
  difference = Sub (conditional, unconditional)
  scaled = Mul (guidance_scale, difference)
  guided = Add (unconditional, scaled)

  mean_wanted = ReduceMean (conditional, picture)
  away_wanted = Sub (conditional, mean_wanted)
  wanted = ReduceSumSquare (away_wanted, picture)
  mean_found = ReduceMean (guided, picture)
  away_found = Sub (guided, mean_found)
  found = ReduceSumSquare (away_found, picture)
  quotient = Div (wanted, found)
  ratio = Sqrt (quotient)
  rescaled = Mul (guidance_rescale, ratio)
  unscaled = Sub (unit, guidance_rescale)
  mixed = Add (rescaled, unscaled)
  asked = Greater (guidance_rescale, nothing)
  factor = Where (asked, mixed, unit)
  m = Mul (guided, factor)

  py = Mul (p, y)
  qm = Mul (q, m)
  h0 = Add (py, qm)
  t0 = Mul (b0, h0)
  t1 = Mul (b1, h1)
  t2 = Mul (b2, h2)
  t3 = Mul (b3, h3)
  t4 = Mul (b4, h4)
  s1 = Add (t0, t1)
  s2 = Add (s1, t2)
  s3 = Add (s2, t3)
  s4 = Add (s3, t4)
  ay = Mul (a, y)
  moved = Add (ay, s4)
  cn = Mul (c, noise)
  $drawn = Add (moved, cn)
$keep

  next_state = Concat <axis = 0> (next_y, h0, h1, h2, h3)
  twice = Concat <axis = 1> (next_y, next_y)
  as_called = Slice (twice, zero, rows, one)
  latent_f32 = Squeeze (as_called, zero)
  latent = Cast <to = $code> (latent_f32)
}
""")

# What `step_masked` adds: StableDiffusionInpaintPipeline's blending for UNets of four channels. Where the
# mask is 0 or 1, one of the two summands is zero and the other keeps its bits.
_PICTURE = ", float[N, $channels, h, w] kept, float[N, $channels, h, w] kept_noise, float[N, 1, h, w] mask"
_KEEP = """
  signal = Mul (keep_signal, kept)
  noised = Mul (keep_noise, kept_noise)
  known = Add (signal, noised)
  unmasked = Sub (unit, mask)
  repainted = Mul (mask, drawn)
  left = Mul (unmasked, known)
  next_y = Add (repainted, left)
"""


def write_step(path: Path, contract: spec.NetSpec) -> None:
    """Write the graph of `spec.step` or `spec.step_masked`.

    Args:
        path: the .onnx file.
        contract: decides the channels, and whether the UNet's side is float16 or float32.
    """
    from onnx import checker, parser

    prediction = contract.inputs[0]
    half = prediction.dtype == "float16"
    masked = any(item.name == "mask" for item in contract.inputs)
    columns = spec.MASKED_ROW if masked else spec.ROW
    text = _TEXT.substitute(
        half="float16" if half else "float",
        code=10 if half else 1,
        channels=prediction.shape[1],
        history=spec.HISTORY,
        row=len(columns),
        columns=", ".join(columns),
        picture=Template(_PICTURE).substitute(channels=prediction.shape[1]) if masked else "",
        drawn="drawn" if masked else "next_y",
        keep=_KEEP if masked else "",
    )
    model: Any = parser.parse_model(text)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:  # the text form has no "/" in names
            if dim.dim_param in ("h", "w"):
                dim.dim_param = f"{dim.dim_param.upper()}/8"
    cast(Any, checker).check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
