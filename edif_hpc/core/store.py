"""The object store: payloads and results too large for Redis, through boto3.

Keys carry request id and attempt, so that an attempt which lost its lease can never overwrite its successor's result.
boto3 is synchronous; `in_thread` runs a call beside the event loop. It is imported on first use: it costs the gateway
20 MB and a third of a second that most requests never need.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from .endpoints import StoreEndpoint
from .errors import Unavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

CONNECT_SECONDS = 5
READ_SECONDS = 60
PART_BYTES = 16 * 1024 * 1024
PARALLEL_PARTS = 4
CHUNK_BYTES = 1024 * 1024
CONNECTIONS = 32
"""Kept open to the store; downloads beyond it open one each."""
DELETE_BATCH = 1000  # S3's own limit
PAYLOADS = "payloads/"
RESULTS = "results/"
"""What their keys begin with: a worker may read the ones and write the others."""
RESULT_KEY = re.compile(RESULTS + r"([^/]+)/\d+-([0-9a-f]+)")
TOKEN_CHARS = 16


def payload_key(request_id: str) -> str:
    return f"{PAYLOADS}{request_id}"


def result_key(request_id: str, attempt: int, token: str) -> str:
    return f"{RESULTS}{request_id}/{attempt}-{token[:TOKEN_CHARS]}"


def attempt_of(key: str) -> tuple[str, str] | None:
    """Request id and beginning of the token of the attempt whose result has this key; None for any other key."""
    found = RESULT_KEY.fullmatch(key)
    return (found[1], found[2]) if found else None


@dataclass(frozen=True)
class Upload:
    """An upload in parts that was not completed. `began`: Unix time, of the store's clock."""

    key: str
    upload_id: str
    began: float


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run one store call beside the event loop."""
    return await asyncio.to_thread(function, *args)


async def in_daemon(function: Callable[..., T], *args: Any) -> T:
    """Run one store call in a thread of its own, which holds up neither whoever stops waiting nor the process's end."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is None:
            outcome.set_result(cast("T", value))
        else:
            outcome.set_exception(error)

    def run() -> None:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = function(*args)
        except BaseException as raised:  # noqa: BLE001 - raised again where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended; nobody waits any more
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="store", daemon=True).start()
    return await outcome


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")


def _is_safe(url: str) -> bool:
    return _is_loopback(url) or url.startswith("https://")


class Store:
    """One bucket. Methods block; errors of the store and of the way to it are `Unavailable`."""

    def __init__(self, endpoint: StoreEndpoint) -> None:
        self.endpoint = endpoint
        self._client: S3Client | None = None
        self._public: S3Client | None = None
        self._lock = threading.Lock()

    @property
    def client(self) -> S3Client:
        with self._lock:
            if self._client is None:
                self._client = self._connect(self.endpoint.endpoint)
            return self._client

    def _connect(self, url: str) -> S3Client:
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=url,
            region_name=self.endpoint.region,
            aws_access_key_id=self.endpoint.access_key,
            aws_secret_access_key=self.endpoint.secret_key,
            verify=self.endpoint.authority or None,
            config=Config(
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                max_pool_connections=CONNECTIONS,
                retries={"max_attempts": 3, "mode": "standard"},
                # An embedded store is in the same machine or the same cluster: no proxy leads there.
                proxies={} if self.endpoint.authority or _is_loopback(url) else None,
                # Hashing 140 MB for a signature takes both sides a quarter of a second; over loopback and TLS nobody
                # tampers.
                s3={"addressing_style": "path", "payload_signing_enabled": not _is_safe(url)},
                # Newer botocore adds a trailing checksum that many S3 servers do not read.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def _call(self, what: str, function: Callable[[], T]) -> T:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return function()
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise Unavailable(f"The object store at {self.endpoint.endpoint} did not {what}: {error}") from error

    def ensure_bucket(self) -> None:
        from botocore.exceptions import ClientError

        def ensure() -> None:
            try:
                self.client.head_bucket(Bucket=self.endpoint.bucket)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") not in ("404", "NoSuchBucket"):
                    raise
                self.client.create_bucket(Bucket=self.endpoint.bucket)

        self._call("open its bucket", ensure)

    def put(self, key: str, body: bytes) -> None:
        self._call(f"take {key}", lambda: self.client.put_object(Bucket=self.endpoint.bucket, Key=key, Body=body))

    def upload(self, key: str, file: IO[bytes]) -> None:
        """Upload the whole of an open file in parallel parts.

        By name where it has a descriptor: of a file object boto3 keeps ten parts in memory at a time.
        """
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(
            multipart_threshold=2 * PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARALLEL_PARTS
        )
        bucket = self.endpoint.bucket
        try:
            name = f"/proc/self/fd/{file.fileno()}"
        except io.UnsupportedOperation:
            self._call(f"take {key}", lambda: self.client.upload_fileobj(file, bucket, key, Config=config))
        else:
            self._call(f"take {key}", lambda: self.client.upload_file(name, bucket, key, Config=config))

    def copy(self, source: str, key: str) -> None:
        """Copy an object inside the store, up to the 5 GB that S3 copies in one go."""
        bucket = self.endpoint.bucket
        self._call(
            f"copy {source}",
            lambda: self.client.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": source}),
        )

    def get(self, key: str) -> bytes:
        return self._call(
            f"return {key}", lambda: self.client.get_object(Bucket=self.endpoint.bucket, Key=key)["Body"].read()
        )

    def open(self, key: str, byte_range: str | None = None) -> tuple[int, str | None, Iterator[bytes]]:
        """Start reading an object: its length here, its Content-Range if ranged, and the chunks."""

        def start() -> Any:
            extra: dict[str, Any] = {"Range": byte_range} if byte_range else {}
            return self.client.get_object(Bucket=self.endpoint.bucket, Key=key, **extra)

        found = self._call(f"return {key}", start)
        return found["ContentLength"], found.get("ContentRange"), self._chunks(key, found["Body"])

    def _chunks(self, key: str, body: Any) -> Iterator[bytes]:
        """A body in pieces. Closing the iterator closes the connection."""
        with contextlib.closing(body):
            while chunk := self._call(f"go on with {key}", lambda: body.read(CHUNK_BYTES)):
                yield chunk

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), DELETE_BATCH):
            batch = [{"Key": key} for key in keys[start : start + DELETE_BATCH]]
            self._call(
                "delete objects",
                # `batch` is bound now, as ruff wants in a loop; mypy infers no type for a lambda with a default.
                lambda batch=batch: self.client.delete_objects(  # type: ignore[misc]  # see above
                    Bucket=self.endpoint.bucket, Delete={"Objects": batch, "Quiet": True}
                ),
            )

    def uploads(self) -> list[Upload]:
        """Uploads in parts that go on, or that nobody will ever complete."""
        pages = self._call(
            "list its uploads",
            lambda: list(self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.endpoint.bucket)),
        )
        return [
            Upload(found["Key"], found["UploadId"], found["Initiated"].timestamp())
            for page in pages
            for found in page.get("Uploads", [])
        ]

    def abort(self, uploads: Sequence[Upload]) -> None:
        """Abort uploads, and so delete their parts; one that ended meanwhile is let be."""
        from botocore.exceptions import ClientError

        for upload in uploads:

            def abort(upload: Upload = upload) -> None:
                try:
                    self.client.abort_multipart_upload(
                        Bucket=self.endpoint.bucket, Key=upload.key, UploadId=upload.upload_id
                    )
                except ClientError as error:
                    if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
                        raise

            self._call("abort an upload", abort)

    def presign(self, key: str, seconds: float) -> str:
        """A signed link to the object, for the endpoint that clients reach."""
        client = self.client
        if self.endpoint.public_endpoint not in ("", self.endpoint.endpoint):
            with self._lock:
                client = self._public = self._public or self._connect(self.endpoint.public_endpoint)
        return client.generate_presigned_url(
            "get_object", Params={"Bucket": self.endpoint.bucket, "Key": key}, ExpiresIn=int(seconds)
        )
