r"""A picture from a Triton server over HTTP, by Python's library alone; its steps are told as they come.

latentrt export-triton demo -o models && tritonserver --model-repository models --disable-auto-complete-config
python examples/triton_http.py localhost:8000 "a red circle on a blue background" circle.png seed=7

What stands behind the file are fields of a request, as docs/serve.md has them. Who ends the program is not
drawn for any more.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any


def events(address: str, prompt: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """What happens to a request, until its last picture; raises RuntimeError with the server's reason."""
    body = json.dumps({"prompt": prompt, **fields})
    with closing(HTTPConnection(address)) as connection:
        connection.request("POST", "/v2/models/latentrt/generate_stream", body)
        for line in filter(bytes.strip, connection.getresponse()):
            told = json.loads(line.removeprefix(b"data:"))
            if "error" in told:
                raise RuntimeError(told["error"])
            yield json.loads(told["event"])


if __name__ == "__main__":
    address, prompt, path, *rest = sys.argv[1:]
    given = {name: json.loads(value) for name, _, value in (word.partition("=") for word in rest)}
    for event in events(address, prompt, **given):
        if event["event"] == "step":
            print(f"step {event['index'] + 1} of {event['total']}", flush=True)
        elif event["event"] == "image":
            Path(path).write_bytes(base64.b64decode(event["b64"]))  # the file, which says how it was made
