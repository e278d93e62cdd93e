"""What a client of Triton does, with NVIDIA's own package: a program of the environment that has it.

    triton_client.py GRPC HTTP VERB < requests as JSON

Prints JSON. It knows nothing of latentrt but names of inputs and outputs.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import queue
import sys
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from PIL import Image
from tritonclient.utils import InferenceServerException

MODEL = "latentrt"


def inputs_of(request: dict[str, Any]) -> list[Any]:
    made = []
    for name in ("prompt", "negative_prompt"):
        if name in request:
            made.append(grpcclient.InferInput(name, [1], "BYTES"))
            made[-1].set_data_from_numpy(np.array([request[name].encode()], dtype=object))
    if "fields" in request or "written" in request:
        text = request.get("written") or json.dumps(request["fields"])
        made.append(grpcclient.InferInput("fields", [1], "BYTES"))
        made[-1].set_data_from_numpy(np.array([text.encode()], dtype=object))
    for name in ("image", "mask_image"):
        if name in request:
            pixels = np.asarray(request[name], np.uint8)
            pixels = pixels.reshape(request.get("shape", pixels.shape))
            made.append(grpcclient.InferInput(name, list(pixels.shape), "UINT8"))
            made[-1].set_data_from_numpy(pixels)
    return made


class Stream:
    """One gRPC stream with one request."""

    def __init__(self, port: int, request: dict[str, Any]) -> None:
        self.answers: queue.Queue[Any] = queue.Queue()
        self.client = grpcclient.InferenceServerClient(f"127.0.0.1:{port}")
        self.client.start_stream(callback=lambda result, error: self.answers.put(error or result))
        self.client.async_stream_infer(
            MODEL,
            inputs_of(request),
            parameters=request.get("parameters"),
            enable_empty_final_response=True,
        )

    def __iter__(self) -> Any:
        """(event, its data, pixels) until the last response; raises what the server answers."""
        while True:
            answer = self.answers.get(timeout=120)
            if isinstance(answer, Exception):
                raise answer
            final = answer.get_response().parameters["triton_final_response"].bool_param
            if answer.as_numpy("event") is not None:
                data = json.loads(answer.as_numpy("event")[0])
                yield data.pop("event"), data, answer.as_numpy("image")
            if final:
                return

    def stop(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


def by_grpc(port: int, request: dict[str, Any]) -> dict[str, Any]:
    stream = Stream(port, request)
    kinds, pictures = [], {}
    try:
        for kind, data, pixels in stream:
            kinds.append(kind)
            if kind == "image":
                pictures[data["index"]] = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
        return {"kinds": kinds, "pictures": [pictures[index] for index in sorted(pictures)]}
    except InferenceServerException as error:
        return {"error": error.message(), "status": str(error.status())}
    finally:
        stream.stop()


def by_http(port: int, request: dict[str, Any]) -> dict[str, Any]:
    sent = {**request, **request.get("parameters", {})}
    sent.pop("parameters", None)
    if "fields" in sent:
        sent["fields"] = json.dumps(sent["fields"])
    if "written" in sent:
        sent["fields"] = sent.pop("written")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps(sent)
    connection.request(
        "POST", f"/v2/models/{MODEL}/generate_stream", body, {"content-type": "application/json"}
    )
    answer = connection.getresponse()
    kinds, pictures = [], {}
    for line in answer:
        if not line.startswith(b"data:"):
            continue
        told = json.loads(line[5:])
        if "error" in told:
            return {"error": told["error"], "status": answer.status}
        data = json.loads(told["event"])
        kinds.append(data["event"])
        if data["event"] == "image":
            pixels = np.asarray(Image.open(io.BytesIO(b64decode(data["b64"]))).convert("RGB"))
            pictures[data["index"]] = hashlib.sha256(pixels.tobytes()).hexdigest()
    connection.close()
    return {
        "kinds": kinds,
        "pictures": [pictures[index] for index in sorted(pictures)],
        "status": answer.status,
    }


def draw(grpc: int, http_port: int, requests: list[dict[str, Any]]) -> list[Any]:
    """All at once, the even ones over gRPC."""
    with ThreadPoolExecutor(len(requests)) as threads:
        ways = [(by_http, http_port) if number % 2 else (by_grpc, grpc) for number in range(len(requests))]
        futures = [threads.submit(way, port, one) for (way, port), one in zip(ways, requests, strict=True)]
        return [future.result() for future in futures]


def leave(grpc: int, http_port: int, requests: list[dict[str, Any]]) -> list[Any]:
    """Ask, and leave at the first step."""
    left = []
    for request in requests:
        stream = Stream(grpc, request)
        for kind, _, _ in stream:
            if kind == "step":
                break
        stream.stop()
        left.append(kind)
    return left


def drop(grpc: int, http_port: int, requests: list[dict[str, Any]]) -> int:
    """Send each, and close the connection without reading; every second over gRPC."""
    for number, request in enumerate(requests):
        if number % 2:
            Stream(grpc, request).stop()
            continue
        connection = http.client.HTTPConnection("127.0.0.1", http_port, timeout=60)
        connection.request("POST", f"/v2/models/{MODEL}/generate_stream", json.dumps(request))
        connection.close()
    return len(requests)


if __name__ == "__main__":
    ports = int(sys.argv[1]), int(sys.argv[2])
    print(json.dumps({"draw": draw, "leave": leave, "drop": drop}[sys.argv[3]](*ports, json.load(sys.stdin))))
