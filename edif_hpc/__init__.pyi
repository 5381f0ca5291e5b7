from .client import Batch as Batch
from .client import ClientError as ClientError
from .client import Connection as Connection
from .client import CorruptPart as CorruptPart
from .client import DownloadFailed as DownloadFailed
from .client import DryRun as DryRun
from .client import DryRunStopped as DryRunStopped
from .client import Event as Event
from .client import Misused as Misused
from .client import NotConnected as NotConnected
from .client import NotFinished as NotFinished
from .client import Refused as Refused
from .client import Request as Request
from .client import RequestFailed as RequestFailed
from .client import ResultExpired as ResultExpired
from .client import Saved as Saved
from .client import SurpriseWarning as SurpriseWarning
from .client import Unreachable as Unreachable
from .client import UntrustedResult as UntrustedResult
from .client import batch as batch
from .client import connect as connect
from .client import disconnect as disconnect
from .client import dry_run as dry_run
from .client import get as get
from .client import load as load
from .client import requests as requests
from .client import submit as submit

def save(name: str, value: object) -> None: ...

__version__: str
