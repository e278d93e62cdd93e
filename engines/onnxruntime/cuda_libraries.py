"""NVIDIA's libraries for ONNX Runtime's CUDA provider: found where pip put them, and loaded before it asks.

The provider is linked to the CUDA runtime and cuBLAS, and loads cuDNN when the first convolution runs. All of
them are looked for by the system's loader, which knows nothing of wheels, unless they are loaded already.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from .session import library, missing_cudnn

_CUDNN = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"


@cache
def load_libraries() -> str:
    """Load CUDA's and cuDNN's libraries, once, before the first session that needs them.

    Returns what did not load, in the library's words; "" if all is well.

    `preload_dlls` looks beside onnxruntime itself, or flat in one folder. The wheels of CUDA 13 may lie in
    another folder of the path (a user's site, the system's below a virtual environment), so they are asked
    where they are.

    Raises:
        BackendError: there is no cuDNN. The provider opens without it, and fails at the first convolution.
    """
    ort, text = library(), ""
    major = str(getattr(ort, "cuda_version", "")).partition(".")[0]
    if hasattr(ort, "preload_dlls"):  # since 1.21
        with redirect_stdout(StringIO()) as printed:
            if cuda := _wheel_libraries(f"nvidia.cu{major}"):
                ort.preload_dlls(cudnn=False, directory=str(cuda))
            if cudnn := _wheel_libraries("nvidia.cudnn"):
                ort.preload_dlls(cuda=False, directory=str(cudnn))
            if not (cuda and cudnn):
                ort.preload_dlls(cuda=not cuda, cudnn=not cudnn)
        text = "; ".join(printed.getvalue().splitlines())
    try:
        ctypes.CDLL(_CUDNN)
    except OSError as error:
        raise missing_cudnn(f"cuDNN does not load: {error}") from error
    return text


def _wheel_libraries(package: str) -> Path | None:
    """The folder of libraries in a wheel of NVIDIA's; None where it is not installed, or not on Linux."""
    with suppress(Exception):  # a package that is damaged is as good as none
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (folder := Path(place) / "lib").is_dir():
                return folder
    return None
