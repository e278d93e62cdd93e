"""Hand-written graphs without weights that satisfy the contracts; all that a UNet may be given is heard.

A prediction depends on the latent, on what lies behind it, on the prompt's keys and on the time invariants,
each in a way of its own; so a loop that feeds one of them wrongly draws something else.
"""

from pathlib import Path
from string import Template

from onnx import parser

from latentrt.checkpoints.graphs.step import write_step
from latentrt.engines import spec
from latentrt.engines.package import TIME_IDS, Manifest, NetFile, Package, write_manifest
from latentrt.engines.spec import NetSpec, TensorSpec

TOKENS, WIDTH, IMAGE_CHANNELS = 6, 8, 5
VECTORS = {"class_labels": 7, "time_ids": 6}

_CONTEXT = """
context (float[B, 6, 8] context) => (float[B, 4, 1, 1] "context.keys")
  <int64[1] tokens = {1}, int64[1] zero = {0}, int64[1] four = {4}, int64[2] cells = {2, 3}>
{
  mean = ReduceMean <keepdims = 0> (context, tokens)
  some = Slice (mean, zero, four, tokens)
  "context.keys" = Unsqueeze (some, cells)
}
"""
# `time.scale` has 3 values: rows of it do not begin at aligned addresses.
_TIME = """
time (float[S] timestep$vectors) => (float[S, 4, 1, 1] "time.shift", float[S, 3] "time.scale")
  <int64[1] zero = {0}, int64[1] one = {1}, int64[1] four = {4}, int64[1] three = {3},
   int64[2] cells = {2, 3}, float[4] rates = {0.01, 0.02, 0.03, 0.05}>
{
  column = Unsqueeze (timestep, one)
  angles = Mul (column, rates)
  waves = Cos (angles)
  $told
  "time.shift" = Unsqueeze (all, cells)
  "time.scale" = Slice (all, one, four, one)
}
"""
_TOLD = """
  labels = Slice (class_labels, zero, four, one)
  ids = Slice (time_ids, zero, four, one)
  both = Add (labels, ids)
  all = Add (waves, both)
"""
_UNET = """
unet (float[B, 4, "H/8", "W/8"] latent$image, float[B, 4, 1, 1] "context.keys",
      float[$rows, 4, 1, 1] "time.shift", float[$rows, 3] "time.scale")
  => (float[B, 4, "H/8", "W/8"] prediction)
  <int64[1] one = {1}, int64[2] cells = {2, 3}, float half = {0.5}>
{
  shifted = Add (latent, "time.shift")
  keyed = Add (shifted, "context.keys")
  scale = ReduceMean <keepdims = 1> ("time.scale", one)
  scales = Unsqueeze (scale, cells)
  scaled = Mul (keyed, scales)
  $seen
  halved = Mul (seen, half)
  prediction = Tanh (halved)
}
"""
_SEEN = """
  picture = ReduceMean <keepdims = 1> (image_latents, one)
  seen = Add (scaled, picture)
"""
_DECODER = """
decoder (float[N, 4, "H/8", "W/8"] latent) => (uint8[N, H, W, 3] image, float[N] mean)
  <int64[1] zero = {0}, int64[1] one = {1}, int64[1] three = {3}, int64[3] picture = {1, 2, 3},
   float[4] scales = {1.0, 1.0, 8.0, 8.0}, float grey = {127.5}, float black = {0}, float white = {255}>
{
  large = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric"> (latent, , scales)
  colours = Slice (large, zero, three, one)
  shades = Mul (colours, grey)
  lit = Add (shades, grey)
  last = Transpose <perm = [0, 2, 3, 1]> (lit)
  mean = ReduceMean <keepdims = 0> (last, picture)
  clipped = Clip (last, black, white)
  image = Cast <to = 2> (clipped)
}
"""
_ENCODER = """
encoder (uint8[N, H, W, 3] image, uint8[N, H, W, 1] mask) => (float[N, 4, "H/8", "W/8"] mean)
{
  both = Concat <axis = 3> (image, mask)
  first = Transpose <perm = [0, 3, 1, 2]> (both)
  shades = Cast <to = 1> (first)
  mean = AveragePool <kernel_shape = [8, 8], strides = [8, 8]> (shades)
}
"""


def _parse(text: str) -> bytes:
    return parser.parse_model('<ir_version: 10, opset_import: ["": 23]>' + text).SerializeToString()


def write_small_package(
    root: Path, *, vectors: bool = False, image: bool = False, older: bool = False
) -> Package:
    """A package with every net that a loop needs, but for text encoders.

    An `older` one has no `step_masked`, and one row of time invariants for all UNet rows.
    """
    widths = VECTORS if vectors else {}
    rows = 1 if older else "B"
    keys = TensorSpec(name="context.keys", dtype="float32", shape=("B", 4, 1, 1))
    shift = TensorSpec(name="time.shift", dtype="float32", shape=(rows, 4, 1, 1))
    scale = TensorSpec(name="time.scale", dtype="float32", shape=(rows, 3))
    computed = [
        TensorSpec(name=item.name, dtype=item.dtype, shape=("S", *item.shape[1:])) for item in (shift, scale)
    ]
    told = {
        "vectors": "".join(f", float[S, {width}] {name}" for name, width in sorted(widths.items())),
        "told": _TOLD if vectors else "all = Identity (waves)",
        "rows": str(rows),
        "image": f', float[B, {IMAGE_CHANNELS}, "H/8", "W/8"] image_latents' if image else "",
        "seen": _SEEN if image else "seen = Identity (scaled)",
    }
    contracts: dict[str, tuple[NetSpec, str]] = {
        "unet_context": (
            spec.unet_context(width=WIDTH, float_dtype="float32", invariants=[keys]),
            _CONTEXT,
        ),
        "unet_time": (spec.unet_time(invariants=computed, vectors=widths), _TIME),
        "unet": (
            spec.unet(
                channels=4,
                float_dtype="float32",
                invariants=[keys, shift, scale],
                image_channels=IMAGE_CHANNELS if image else 0,
            ),
            _UNET,
        ),
        "vae_encoder": (spec.vae_encoder(channels=4, posterior=False), _ENCODER),
        "vae_decoder": (spec.vae_decoder(channels=4, float_dtype="float32"), _DECODER),
        "step": (spec.step(channels=4, float_dtype="float32"), ""),
    }
    if not older:
        contracts["step_masked"] = spec.step_masked(channels=4, float_dtype="float32"), ""
    nets: dict[str, NetFile] = {}
    root.mkdir(parents=True)
    for name, (contract, text) in contracts.items():
        if text:
            (root / f"{name}.onnx").write_bytes(_parse(Template(text).substitute(told)))
        else:
            write_step(root / f"{name}.onnx", contract)
        nets[name] = NetFile(graph=f"{name}.onnx", weights=(), spec=contract)
    return write_manifest(
        root,
        Manifest(
            name="small",
            family="none",
            dtype="fp32",
            latent_channels=4,
            context_width=WIDTH,
            max_tokens=TOKENS,
            scheduler={"_class_name": "DDIMScheduler"},
            nets=nets,
            time_ids=TIME_IDS[: widths.get("time_ids", 0)],
            image_latents=("mask", "masked_image") if image else (),
        ),
    )
