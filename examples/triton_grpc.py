r"""A picture from a Triton server over gRPC, as pixels; its steps are told as they come.

pip install "tritonclient[grpc]" pillow
python examples/triton_grpc.py localhost:8001 "a red circle on a blue background" circle.png seed=7

What stands behind the file are fields of a request, as docs/serve.md has them. Who ends the program is not
drawn for any more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from queue import Queue
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from PIL import Image


def events(address: str, prompt: str, **fields: Any) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """What happens to a request, with the pixels (H, W, 3) of a finished picture; raises Triton's error."""
    answers: Queue[Any] = Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(callback=lambda result, error: answers.put(error or result))
        try:
            inputs = [_text("prompt", prompt), _text("fields", json.dumps(fields))]
            client.async_stream_infer("latentrt", inputs, enable_empty_final_response=True)
            while not isinstance(answer := answers.get(), Exception):
                if answer.get_response().parameters["triton_final_response"].bool_param:
                    return
                yield json.loads(answer.as_numpy("event")[0]), answer.as_numpy("image")
            raise answer
        finally:
            client.stop_stream(cancel_requests=True)


def _text(name: str, value: str) -> triton.InferInput:
    made = triton.InferInput(name, [1], "BYTES")
    made.set_data_from_numpy(np.array([value.encode()], dtype=object))
    return made


if __name__ == "__main__":
    address, prompt, path, *rest = sys.argv[1:]
    given = {name: json.loads(value) for name, _, value in (word.partition("=") for word in rest)}
    for event, pixels in events(address, prompt, **given):
        if event["event"] == "step":
            print(f"step {event['index'] + 1} of {event['total']}", flush=True)
        elif event["event"] == "image":
            Image.fromarray(pixels).save(path)
