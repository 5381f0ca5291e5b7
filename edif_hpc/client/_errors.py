"""What can go wrong at the user's machine, as one tree below `EdifError`.

Every one is a sentence that says what to do next. The exception is `RequestFailed` where the user's own code failed:
its text is their traceback, as nnsight's own client shows it.

    EdifError                          the root of the whole project (edif_hpc.core.errors)
    └── ClientError                    everything this client raises by itself
        ├── NotConnected               no address or no key is known, or the address is none
        ├── Refused                    the service said no; its own sentence, with `code` and `http_status`
        ├── Unreachable                the service stayed away for longer than this client is patient
        ├── Misused                    a handle was used in a way it is not made for
        ├── NotFinished                the time given to `wait` or `result` ended first; also a TimeoutError
        ├── RequestFailed              the request ended in ERROR; nnsight's RemoteError too, so it lives in `_failed`
        ├── DryRunStopped              a dry run met what only a real run can decide
        ├── DownloadFailed             a result could not be read to its end
        │   ├── CorruptPart            a part did not match its checksum, several times
        │   └── ResultExpired          the service keeps it no longer
        └── UntrustedResult            a result names a type that is not loaded without being told to
"""

from __future__ import annotations

from edif_hpc.core.errors import EdifError


class ClientError(EdifError):
    code = "client"


class NotConnected(ClientError):
    code = "not_connected"


class Refused(ClientError):
    """The service's own sentence.

    Args:
        sentence: what it said.
        code: its stable name for the cause, as `quota`; "refused" where it gave none.
        http_status: what it answered with.
    """

    code = "refused"

    def __init__(self, sentence: str, code: str = "refused", http_status: int = 400) -> None:
        super().__init__(sentence)
        self.code = code
        self.http_status = http_status


class Unreachable(ClientError):
    code = "unreachable"
    http_status = 503


class Misused(ClientError):
    code = "misused"


class NotFinished(ClientError, TimeoutError):
    code = "not_finished"


class DryRunStopped(ClientError):
    code = "dry_run"


class DownloadFailed(ClientError):
    code = "download"


class CorruptPart(DownloadFailed):
    code = "corrupt"


class ResultExpired(DownloadFailed):
    code = "expired"


class UntrustedResult(ClientError):
    code = "untrusted"
