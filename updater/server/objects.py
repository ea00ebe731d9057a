"""The artifact store in a bucket of any S3-compatible object store (Amazon's "S3 API Reference").

An upload is streamed to the store in parts while `updater.artifact` reads it; one part is held in
memory, never the whole. A multipart upload shows nothing until it is completed, and it is completed
only when the last byte was found valid: a kill at any moment leaves either no object or a whole
one. An object without a row (a kill between the two) is never visible to anybody, and it and
uploads that nobody completed are swept away later. Each part goes with its MD5, which the store
checks, and the size of the whole is asked for before it counts.

Nothing here is Amazon's own: the calls are those that all such stores have (no checksum trailers,
no conditional writes). The bucket must exist. Devices never meet the store: the server reads it for
them, range by range, so that links, TLS and limits stay its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

from updater.artifact.signature import PublicKey
from updater.server.artifacts import SUFFIX, SWEEP_AGE_S, Stored, validated
from updater.server.errors import RefusedError, ServerError
from updater.server.models import new_id
from updater.server.settings import Bucket

# At most 10,000 parts make an object, and each but the last has at least 5 MiB (S3's limits).
PART_BYTES = 8 << 20
MAX_PARTS = 10_000
_PIECE = 256 * 1024
_RETRY_AFTER_S = 5


class ObjectStore:
    """A bucket of artifacts; a `Store`. With `keys`, only what one of them signed is taken."""

    def __init__(self, bucket: Bucket, keys: Sequence[PublicKey] = ()) -> None:
        self.bucket = bucket
        self._keys = keys
        self._client = _connect(bucket)

    def check(self) -> None:
        """Ask for the bucket, so that a wrong setting shows at once. Raises ServerError."""
        try:
            with _telling("reach"):
                self._client.head_bucket(Bucket=self.bucket.name)
        except RefusedError as error:
            raise ServerError(f"s3://{self.bucket.name}: {error.message}") from error

    def path(self, artifact_id: str) -> None:
        """Return None: there is no file."""

    def size(self, artifact_id: str) -> int | None:
        """Return an artifact's size in bytes, or None if it isn't there."""
        with _telling("read"):
            try:
                answer = self._client.head_object(**self._key(artifact_id))
            except _errors().ClientError as error:
                if _status(error) == 404:
                    return None
                raise
        return int(answer["ContentLength"])

    def read(self, artifact_id: str, start: int, count: int) -> Iterator[bytes]:
        """Yield `count` bytes of an artifact from byte `start` on."""
        if not count:
            return
        with _telling("read"):
            answer = self._client.get_object(
                **self._key(artifact_id), Range=f"bytes={start}-{start + count - 1}"
            )
            with closing(answer["Body"]) as body:
                yield from body.iter_chunks(_PIECE)

    def check_room(self, size: int) -> None:
        """Refuse what no store would take; how much room there is can't be asked."""
        if size > PART_BYTES * MAX_PARTS:
            raise RefusedError(413, f"{size} bytes are more than the store takes at once")

    def receive(self, pull: Callable[[], bytes], limit: int) -> Stored:
        """Stream an upload to the store and validate it; `pull` gives its bytes, b"" at the end.

        Raises RefusedError: 413 over `limit`, 422 for an invalid artifact, 503 if the store fails,
        507 if it is full.
        """
        artifact_id = new_id()
        with _telling("write"):
            upload = _Upload(self._client, self._key(artifact_id))
            try:
                stored = validated(artifact_id, pull, upload, limit, self._keys)
                upload.complete()
            except BaseException:
                upload.abandon()
                raise
        if self.size(artifact_id) != stored.size:
            self.discard(artifact_id)
            raise RefusedError(503, "the artifact store lost a part", retry_after_s=_RETRY_AFTER_S)
        return stored

    def discard(self, artifact_id: str) -> None:
        """Remove an artifact's object."""
        with _telling("write"):
            self._client.delete_object(**self._key(artifact_id))

    def sweep(self, known: set[str], now: float) -> int:
        """Remove old leftovers of cut uploads; return how many. `known`: ids in the database."""
        removed = 0
        where = {"Bucket": self.bucket.name, "Prefix": self.bucket.prefix}
        with _telling("sweep"):
            for page in self._client.get_paginator("list_multipart_uploads").paginate(**where):
                for upload in page.get("Uploads", ()):
                    if now - upload["Initiated"].timestamp() > SWEEP_AGE_S:
                        self._client.abort_multipart_upload(
                            Bucket=self.bucket.name,
                            Key=upload["Key"],
                            UploadId=upload["UploadId"],
                        )
                        removed += 1
            for page in self._client.get_paginator("list_objects_v2").paginate(**where):
                for item in page.get("Contents", ()):
                    name = str(item["Key"]).removeprefix(self.bucket.prefix)
                    old = now - item["LastModified"].timestamp() > SWEEP_AGE_S
                    # Only what is named as ours is: others may use the bucket too.
                    if old and name.endswith(SUFFIX) and name.removesuffix(SUFFIX) not in known:
                        self._client.delete_object(Bucket=self.bucket.name, Key=item["Key"])
                        removed += 1
        return removed

    def _key(self, artifact_id: str) -> dict[str, str]:
        key = f"{self.bucket.prefix}{artifact_id}{SUFFIX}"
        return {"Bucket": self.bucket.name, "Key": key}


class _Upload:
    """A multipart upload in progress; a sink for `validated`."""

    def __init__(self, client: Any, key: dict[str, str]) -> None:
        self._client = client
        self._key = key
        self._id = ""
        self._parts: list[dict[str, Any]] = []
        self._pending = bytearray()

    def write(self, data: memoryview) -> int:
        """Take all of `data`; send a part when there is enough for one."""
        self._pending += data
        while len(self._pending) >= PART_BYTES:
            self._send(bytes(self._pending[:PART_BYTES]))
            del self._pending[:PART_BYTES]
        return len(data)

    def complete(self) -> None:
        """Make the object visible, whole."""
        if not self._parts:
            body = bytes(self._pending)
            self._client.put_object(**self._key, Body=body, ContentMD5=_md5(body))
            return
        if self._pending:
            self._send(bytes(self._pending))
        self._client.complete_multipart_upload(
            **self._key, UploadId=self._id, MultipartUpload={"Parts": self._parts}
        )
        self._id = ""

    def abandon(self) -> None:
        """Give up; what was sent is removed now if the store answers, else by a sweep."""
        if self._id:
            errors = _errors()
            with suppress(errors.ClientError, errors.BotoCoreError):
                self._client.abort_multipart_upload(**self._key, UploadId=self._id)

    def _send(self, part: bytes) -> None:
        number = len(self._parts) + 1
        if number > MAX_PARTS:
            raise RefusedError(413, "the artifact has more parts than the store takes")
        if not self._id:
            self._id = self._client.create_multipart_upload(**self._key)["UploadId"]
        answer = self._client.upload_part(
            **self._key, UploadId=self._id, PartNumber=number, Body=part, ContentMD5=_md5(part)
        )
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})


class _telling:  # noqa: N801 - used as a statement
    """Turns what the library raises into what a client is told."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        """Nothing to do yet."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Raise RefusedError in place of the library's errors."""
        if error is None:
            return
        errors = _errors()
        if isinstance(error, errors.ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = _status(error)
            if status in (413, 507) or code in ("QuotaExceeded", "EntityTooLarge"):
                raise RefusedError(507, f"the artifact store is full ({code})") from error
            raise RefusedError(
                503,
                f"the artifact store refuses to {self._doing}: {code or status}",
                retry_after_s=_RETRY_AFTER_S,
            ) from error
        if isinstance(error, errors.BotoCoreError | errors.HTTPClientError):
            raise RefusedError(
                503,
                f"the artifact store does not answer ({type(error).__name__}); try again",
                retry_after_s=_RETRY_AFTER_S,
            ) from error


def _connect(bucket: Bucket) -> Any:
    """Return a client of the AWS library, which is imported only where a bucket is used."""
    try:
        import boto3  # noqa: PLC0415
        from botocore.config import Config  # noqa: PLC0415
    except ImportError as error:
        raise ServerError(
            "artifacts in an S3 bucket need boto3: pip install 'brownout[server-s3]'"
        ) from error
    given = {"aws_access_key_id": bucket.access_key, "aws_secret_access_key": bucket.secret}
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=bucket.endpoint or None,
            region_name=bucket.region or None,
            verify=str(bucket.ca) if bucket.ca else None,
            config=Config(
                connect_timeout=5,
                read_timeout=30,
                retries={"mode": "standard", "total_max_attempts": 4},
                max_pool_connections=64,
                # A store of one's own has seldom a DNS name for each bucket.
                s3={"addressing_style": "path" if bucket.endpoint else "auto"},
                # Checksum trailers are Amazon's; ours is the parts' MD5, which all stores check.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
            **(given if bucket.access_key else {}),
        )
    except (_errors().BotoCoreError, ValueError) as error:
        raise ServerError(f"s3://{bucket.name}: {error}") from error


def _errors() -> Any:
    import botocore.exceptions  # noqa: PLC0415

    return botocore.exceptions


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _md5(data: bytes) -> str:
    digest = hashlib.md5(data, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()
