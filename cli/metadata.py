"""`latentrt metadata`: how a picture was made, read from its file; no model is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def metadata(
    picture: Annotated[Path, Argument(help="A .png, .jpg or .webp file.")],
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the parameters stored in a picture (AUTOMATIC1111's text, and our own record)."""
    from ..runtime.pictures.write import parse_infotext, read_metadata

    found = read_metadata(picture)
    if as_json:
        fields = parse_infotext(found.parameters) if found.parameters else None
        print(json.dumps({"parameters": fields, "record": found.record}))
        return
    print(found.parameters or "no parameters")
    if found.record:
        print(json.dumps(found.record, indent=1))
