"""The three isolation levels, named the same in settings, logs, events and tests."""

from enum import StrEnum


class Isolation(StrEnum):
    """How far a request's code is kept from everything else, weakest first.

    `none`: in the model host itself; for one's own use. `process`: an own process with a cleared environment, closed
    descriptors and limits, killable from outside. `locked`: also no network, no exec, no signals to others, a private
    scratch and a read-only rest.
    """

    NONE = "none"
    PROCESS = "process"
    LOCKED = "locked"

    @property
    def rank(self) -> int:
        return list(Isolation).index(self)

    def covers(self, demanded: "Isolation") -> bool:
        """Whether this level is at least as strong as the one demanded."""
        return self.rank >= demanded.rank
