"""Seconds of an iteration's phases."""

import time


class PhaseClock:
    """Runs from its making; `seconds` holds each phase that has ended, as `NAME_seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Ends a phase, where the next begins."""
        now = time.monotonic()
        self.seconds[f"{name}_seconds"] = now - self._last
        self._last = now

    def phases(self) -> list[tuple[str, float]]:
        """Each phase by its name, with seconds to divide by."""
        return [(name.removesuffix("_seconds"), max(seconds, 1e-9)) for name, seconds in self.seconds.items()]
