"""The line between a worker and who watches over it on the batch host: two pipes with names, in a folder both see.

A worker in a container has no `sbatch`, so it asks, and is answered, in lines of text that bash reads as well:

    successor 5                         successor 5 submitted 4711
                                        successor 5 refused Slurm did not answer.
    recall 5                            recall 5 done
    served 4

The last one is a note of the worker's about itself, which nobody answers and bash passes over. Both ends hold both
pipes open for reading and writing: so nobody blocks, and the end of one is no end for the other.
"""

from __future__ import annotations

from typing import Literal

ASKS, ANSWERS = "asks", "answers"
"""The pipes: what the worker writes, and what it reads."""
LONGEST = 4096
"""Bytes of a line: what a pipe takes whole."""

Verb = Literal["successor", "recall", "served"]
SUCCESSOR: Verb = "successor"
RECALL: Verb = "recall"
SERVED: Verb = "served"
SUBMITTED, DONE, REFUSED = "submitted", "done", "refused"
"""The first word of an answer; an id or a sentence may follow."""
