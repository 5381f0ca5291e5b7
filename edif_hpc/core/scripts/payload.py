"""The script itself as it travels: plain JSON, so that reading one runs nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ..errors import EnvelopeError


@dataclass(frozen=True)
class Script:
    """Source text, the name that tracebacks show, and what `sys.argv` holds after it."""

    source: str
    file: str = "script.py"
    arguments: list[str] = field(default_factory=list)

    def pack(self) -> bytes:
        return json.dumps({"source": self.source, "file": self.file, "arguments": self.arguments}).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> Script:
        """The script in a payload.

        Raises:
            EnvelopeError: it is none.
        """
        try:
            found = json.loads(payload)
            source, file, arguments = found["source"], found["file"], found["arguments"]
        except (ValueError, KeyError, TypeError, RecursionError):
            source = file = arguments = None
        if (
            not (isinstance(source, str) and isinstance(file, str) and isinstance(arguments, list))
            or not all(isinstance(argument, str) for argument in arguments)
            or "\0" in source
        ):
            raise EnvelopeError("The request's payload is no script; send it with `edif-hpc submit`.")
        return cls(source, file, arguments)
