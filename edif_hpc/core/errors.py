"""Every refusal of this project, as one tree.

A refusal is one sentence that names the cause and what to do next. Each class carries a stable `code` (for `--json`,
logs and tests) and the HTTP status the gateway answers with. A traceback means that the user's own code failed; it is
never one of these.

    EdifError                     500  internal
    ├── SettingsError             500  settings            a wrong or contradictory value; names the key
    ├── EnvelopeError             422  envelope            the request's envelope is malformed
    ├── PayloadTooLarge           413  payload_too_large
    ├── ClientVersionError        400  client_version      the nnsight version is outside the supported range
    ├── ModelKeyError             400  model_key           the key names a class that is not on the allow-list
    ├── MethodError               422  method              an unknown method, or a parameter it cannot use
    ├── ModelError                404  model               not in the cache, not allowed, or cannot fit
    ├── KeyRequired               401  key_required        no key, or one that is unknown or revoked
    ├── AdminRequired             403  admin_required      the key is not an admin's
    ├── LinkInvalid               403  link                a result link that expired or was tampered with
    ├── NotYours                  404  unknown_request     unknown, expired or another user's
    ├── WrongState                409  state               the request has not ended, or ended otherwise
    ├── QuotaExceeded             429  quota
    ├── Unavailable               503  unavailable         Redis or the store is away; try again
    ├── LeaseLost                 409  lease_lost          the attempt's token is no longer the current one
    ├── SavedError                422  saved               a value that the result's file cannot hold
    ├── TransferError             502  transfer            a result that came damaged, cut off or larger than allowed
    └── ComponentError            500  component           a component could not start or is of another version
        └── HostError             500  model_host          a model host could not load its model
            └── HostDied          500  model_host_died     it ended without saying why; another try may do
"""


class EdifError(Exception):
    """The root. `str(error)` is the sentence that the user sees."""

    code = "internal"
    http_status = 500


class SettingsError(EdifError):
    code = "settings"


class EnvelopeError(EdifError):
    code = "envelope"
    http_status = 422


class PayloadTooLarge(EdifError):
    code = "payload_too_large"
    http_status = 413


class ClientVersionError(EdifError):
    code = "client_version"
    http_status = 400


class ModelKeyError(EdifError):
    code = "model_key"
    http_status = 400


class MethodError(EdifError, ValueError):
    code = "method"
    http_status = 422


class ModelError(EdifError):
    code = "model"
    http_status = 404


class TooLarge(ModelError):
    """One worker cannot hold it; another may."""


class KeyRequired(EdifError):
    code = "key_required"
    http_status = 401


class AdminRequired(EdifError):
    code = "admin_required"
    http_status = 403


class LinkInvalid(EdifError):
    code = "link"
    http_status = 403


class NotYours(EdifError):
    code = "unknown_request"
    http_status = 404


class WrongState(EdifError):
    code = "state"
    http_status = 409


class QuotaExceeded(EdifError):
    code = "quota"
    http_status = 429


class Unavailable(EdifError):
    code = "unavailable"
    http_status = 503


class LeaseLost(EdifError):
    code = "lease_lost"
    http_status = 409


class SavedError(EdifError):
    code = "saved"
    http_status = 422


class TransferError(EdifError):
    code = "transfer"
    http_status = 502


class ComponentError(EdifError):
    code = "component"


class HostError(ComponentError):
    code = "model_host"


class HostDied(HostError):
    code = "model_host_died"
