"""A method by name as a request: a script of two lines, whose one argument says which method, model and parameters.

So it goes the way of every script, and nothing between the command line and the model knows that it is a method. The
other end is `edif_hpc.toolkit.asked`, which only a process with torch can import.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from .envelope import NamedModel
from .payload import Script

SOURCE = "from edif_hpc.toolkit.asked import main\n\nmain()\n"


@dataclass(frozen=True)
class Asked:
    """What is asked for.

    Args:
        method: its name.
        repo_id, revision, task: the model.
        form: suffix of the file that the result becomes.
        parameters: plain values.
    """

    method: str
    repo_id: str
    revision: str | None
    task: str | None
    form: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, method: str, model: NamedModel, form: str, parameters: dict[str, Any]) -> Asked:
        key = model.key()
        return cls(method, key.repo_id, key.revision, key.task, form, parameters)

    def script(self) -> Script:
        return Script(SOURCE, f"{self.method}.py", [json.dumps(asdict(self))])

    @classmethod
    def read(cls, argument: str) -> Asked:
        return cls(**json.loads(argument))
