"""The queue: every transition of a request, as one atomic script each. See `keys` for what lies in Redis."""

from .events import Event, Events
from .queue import Claim, Queue, Release, Step, Submission, Swept, Verdict

__all__ = ["Claim", "Event", "Events", "Queue", "Release", "Step", "Submission", "Swept", "Verdict"]
