"""Workers that have fallen silent: of a host that is lost, or a network that is cut, nobody tells.

TCP tells late, since the connection to a worker ends at the gateway's proxy: after 150 s with that one's keepalive, and
after minutes where data is under way. Heartbeats tell sooner, but they come from the process that runs the tasks, and a
task that keeps the interpreter's lock holds them up for as long as it likes, as calls of PyROOT do. So the guard of the
worker's job speaks for a worker that cannot (`worker.start`): of one that is silent beside that, nobody hears.

It travels by value to the scheduler (see `demand`): it imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Mapping

WORKER_TTL = 60.0
"""Seconds of silence after which a worker is given up."""

INTERVAL = 5.0
"""Seconds between two looks."""


class Heartbeats:
    """For how long each worker has been silent.

    Time is counted by looks, not by the clock: a scheduler that was held up itself has not listened.
    """

    def __init__(self) -> None:
        self._heard: dict[str, tuple[float, float]] = {}

    def lost(self, last_seen: Mapping[str, float], elapsed: float, limit: float) -> list[str]:
        """Take a look; returns the workers that have been silent for longer than `limit` seconds.

        Args:
            last_seen: for each worker a value that is another one after each word of it.
            elapsed: seconds since the last look.
            limit: seconds of silence.
        """
        listened = min(elapsed, 2 * INTERVAL)
        before, self._heard = self._heard, {}
        for worker, seen in last_seen.items():
            last, silent = before.get(worker, (None, 0.0))
            self._heard[worker] = seen, silent + listened if last == seen else 0.0
        return [worker for worker, (_, silent) in self._heard.items() if silent > limit]
