"""The last events, and the clients of the control socket that follow them (`Monitor` in io.pbrd.Daemon).

Nobody is waited for: each follower has a bounded queue, and is told how many events did not fit into it.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

PAST = 1000  # events that are kept, and that wait for one follower
GATHER = 0.1  # seconds between two messages to a follower: what happens meanwhile goes together
GATHER_STATUS = 0.5  # likewise if the status goes with it, as that may be long
PACE, DAY = 1, 86400  # seconds, the shortest interval and the longest

Object = dict[str, Any]


class Follower:
    """What waits for one client."""

    def __init__(self, status: bool) -> None:
        self.status = status  # it wants the status, too
        self.changed = False  # and has not got the last one
        self.events: deque[Object] = deque()
        self.missed = 0
        self.awake = asyncio.Event()

    def add(self, event: Object) -> None:
        """Queue one event; when there is no room, the oldest is dropped and counted."""
        if len(self.events) >= PAST:
            self.events.popleft()
            self.missed += 1
        self.events.append(event)
        self.awake.set()


class Monitor:
    """The ring of events and its followers. `status` returns the document that `Status` answers."""

    def __init__(self, status: Callable[[], Object], in_journal: bool) -> None:
        """`in_journal`: the same events, and older ones, lie in systemd's journal."""
        self.status, self.in_journal = status, in_journal
        self.past: deque[Object] = deque(maxlen=PAST)
        self.followers: set[Follower] = set()

    def add(self, event: Object) -> None:
        """Keep an event (`events.Event.to_json`) and tell it to all who follow."""
        self.past.append(event)
        for follower in self.followers:
            follower.add(event)

    @property
    def watched(self) -> bool:
        """Whether anybody wants to hear of a changed status."""
        return any(follower.status for follower in self.followers)

    def changed(self) -> None:
        """Say that the status is another one, be it by an event or not."""
        for follower in self.followers:
            if follower.status:
                follower.changed = True
                follower.awake.set()

    def look(self, asked: Object) -> Object:
        """Answer one call without `more`: the last `history` events (default 0), the status if `status`."""
        history = max(0, asked.get("history", 0))
        events = list(self.past)[-history:] if history else []
        return self._answer(events, 0, bool(asked.get("status")))

    async def follow(self, asked: Object) -> AsyncGenerator[Object, None]:
        """Answer a call with `more`: first as `look`, and then whenever something happens.

        With `interval` (seconds) the status comes at that pace, too, with the measures of then.
        """
        follower = Follower(bool(asked.get("status")))
        interval = min(max(PACE, asked.get("interval", DAY)), DAY)
        now = asyncio.get_running_loop().time
        due = now() + interval if follower.status else None
        self.followers.add(follower)
        try:
            yield self.look(asked)
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await follower.awake.wait()
                follower.awake.clear()
                if due is not None and now() >= due:
                    follower.changed = True
                    due = max(due + interval, now())  # what could not be sent in time is left out
                events, follower.events = list(follower.events), deque()
                missed, follower.missed = follower.missed, 0
                with_status, follower.changed = follower.changed, False
                yield self._answer(events, missed, with_status)
                await asyncio.sleep(GATHER_STATUS if with_status else GATHER)
        finally:
            self.followers.discard(follower)

    def _answer(self, events: list[Object], missed: int, with_status: bool) -> Object:
        status = self.status() if with_status else None
        return {"events": events, "missed": missed, "journal": self.in_journal, "status": status}
