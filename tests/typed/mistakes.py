"""Mistakes that type checkers report: every marked line, and no other."""

from pathlib import Path

import latentrt


def mistakes(pipe: latentrt.Pipeline) -> None:
    pipe("a red circle", steps=3)  # wrong: num_inference_steps
    pipe("a red circle", output_type="np").images[0].save("a.png")  # an array is Any inside
    pipe("a red circle", output_type="np").images.append(1)  # wrong: an array
    pipe("a red circle").images.shape  # wrong: a list  # noqa: B018
    pipe("a red circle", output_type="numpy")  # wrong: "np"
    pipe("a red circle", rng="cuda")  # wrong: "torch-cuda"
    pipe("a red circle", prompt_syntax="A1111")  # wrong: "a1111"
    pipe("a red circle", resize_mode="stretch")  # wrong: "default"
    pipe("a red circle", num_inference_steps="20")  # wrong: an int
    pipe("a red circle", timeout="20")  # wrong: a float
    pipe(b"a red circle")  # wrong: a str
    pipe.stream("a red circle", steps=3)  # wrong: num_inference_steps
    pipe.stream_async("a red circle", rng="cuda")  # wrong: "torch-cuda"
    pipe.warmup(size=64)  # wrong: height, width
    latentrt.refine(pipe, pipe, "a red circle", output_type="numpy")  # wrong: "np"
    latentrt.redraw(pipe, "a.png", steps=3)  # wrong: num_inference_steps
    latentrt.Pipeline.open("demo", graphs="always")  # wrong: "on"
    latentrt.export_package(Path("a"), Path("b"), dtype="bf16")  # wrong: "fp16" or "fp32"
    latentrt.generate("a red circle")  # wrong: there is none
    settings: latentrt.Parameters = {"steps": 3}  # wrong: num_inference_steps
    for step in pipe.stream("a red circle", **settings):
        step.preview("small")  # wrong: "decoder", "tiny", "rgb", "fast"
    pipe("a red circle").save("a.jpg", quality="high")  # wrong: an int
