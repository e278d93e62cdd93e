"""An execution context that has everything, and is only enqueued from then on."""

from __future__ import annotations

from ..errors import BackendError
from ..profiles import NetProfile
from .contexts import Context, Contexts, abilities
from .loading import Loaded
from .log import messages


class BoundTensorRTNet:
    """An execution context with everything set. `io` is the bytes of its inputs and outputs."""

    def __init__(
        self, loaded: Loaded, context: Context, contexts: Contexts, *, profile: NetProfile, io: int
    ) -> None:
        self._profile, self.io = profile, io
        self._contexts: Contexts | None = contexts  # until the first run
        self._held: tuple[Loaded, Context] | None = (loaded, context)
        self._stream = loaded.device.stream

    @property
    def profile(self) -> str:
        """What it was optimised for, for people."""
        return self._profile.label

    @property
    def capturable(self) -> bool:
        """Whether the library says that a run can be captured; True where it does not say."""
        loaded, context = self._opened()
        tells = abilities(loaded.trt).tells_capturable
        return not tells or bool(context.is_stream_capturable(self._stream))

    def enqueue(self) -> None:
        """Put one run on the stream. Raises BackendError (also after `close`), MemoryLimitError."""
        loaded, context = self._opened()
        mark = messages(loaded.trt).mark()
        if not context.execute_async_v3(self._stream):
            raise loaded.failed(mark, "could not be enqueued")
        if self._contexts is not None:
            self._contexts.ran()
            self._contexts = None

    def close(self) -> None:
        """Free the context, once the stream is done with it. May be called twice."""
        held, self._held, self.io = self._held, None, 0
        if held is not None:
            # `held` has the last reference: destroying a context that still runs is undefined behaviour.
            held[0].device.synchronize()

    def _opened(self) -> tuple[Loaded, Context]:
        if self._held is None:
            raise BackendError(
                f"a binding of the profile {self._profile.label!r} is closed",
                expected="one that is open",
                fix="Bind the net again; moving weights off the device closes all bindings.",
            )
        return self._held
