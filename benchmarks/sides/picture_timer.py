"""How long a device is at work on a picture, seen from outside the loop."""

from __future__ import annotations

from typing import Any

from ...engines.device import Device
from ...engines.spec import Array
from ..gpu.opener import CountedDevice


class PictureTimer(CountedDevice):
    """The loop's device, which times a picture from its first upload to the last work before its last wait.

    What the host does before and after is not in it; what it does in between is, if the stream has to wait.
    Two events a picture are all that this adds to the stream.
    """

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.copy = device.copy  # what a row calls is the device's own
        self._watch = device.stopwatch()
        self._started = False
        self._launches_before = 0

    def restart(self) -> None:
        """The next upload is a picture's first."""
        self._started, self._launches_before = False, self.launches

    def upload(self, address: int, array: Array) -> None:
        """As the device's own."""
        if not self._started:
            self._started = True
            self._watch.start()
        self._device.upload(address, array)

    def synchronize(self) -> None:
        """As the device's own."""
        if self._started:
            self._watch.stop()
        self._device.synchronize()

    @property
    def figures(self) -> dict[str, Any]:
        """Of the picture: `device_s`, and whether its rows were those of a captured graph."""
        return {"device_s": self._watch.seconds(), "replayed": self.launches > self._launches_before}

    def stop_timing(self) -> None:
        """Free the events."""
        self._watch.close()
