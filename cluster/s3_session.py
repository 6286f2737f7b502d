"""Connections to S3 and compatible stores: endpoint, region and credentials, for boto3 and for pyarrow.

They come from the AWS environment variables, the AWS config files (`AWS_PROFILE` selects a profile) or the role of the machine, never
from the config of a run. Without any credentials the requests are anonymous, as public buckets accept. Imports nothing else of storage.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from cluster.errors import CappyError, first_line

_CONNECTIONS = 32
_VARIABLES = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
    *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_EC2_METADATA_DISABLED", "HOME"),
)
# Sources of credentials that pyarrow finds and refreshes itself.
_REFRESHED_BY_ARROW = ("iam-role", "container-role", "assume-role-with-web-identity")
# The endpoints that both libraries derive from the region.
_DEFAULT_ENDPOINT = re.compile(r"https://s3[.-]([a-z0-9-]+\.)?amazonaws\.com(\.cn)?")


@dataclass(frozen=True)
class _Settings:
    """The settings of one environment."""

    session: Any
    region: str
    credentials: Any
    """None if there are none: the requests are anonymous."""


def environment() -> tuple[str, ...]:
    """Return the values that select a store and an account. A client is reused only while they are the same."""
    home = Path.home() / ".aws"
    files = (os.environ.get("AWS_CONFIG_FILE") or home / "config", os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials")
    return (*(os.environ.get(name, "") for name in _VARIABLES), *(_changed(Path(file).expanduser()) for file in files))


def _changed(file: Path) -> str:
    try:
        return str(file.stat().st_mtime_ns)
    except OSError:
        return ""


def s3_client(attempts: int = 1) -> Any:
    """Return a thread-safe boto3 client that sends a request up to `attempts` times.

    Use one attempt below `s3.call_with_retries`: it recognises more transient errors than boto3.
    """
    return _new_client(attempts, *environment())


def arrow_filesystem(*environment: str) -> pafs.S3FileSystem:
    """Return pyarrow's S3 filesystem for the endpoint, region and credentials of boto3. `environment` is that of `environment`."""
    settings, endpoint = _settings(*environment), _endpoint(*environment)
    credentials: dict[str, Any] = {}
    if settings.credentials is None:
        credentials = {"anonymous": True}
    elif settings.credentials.method not in _REFRESHED_BY_ARROW:
        found = settings.credentials.get_frozen_credentials()
        credentials = {"access_key": found.access_key, "secret_key": found.secret_key}
        credentials |= {"session_token": found.token} if found.token else {}
    return _new_arrow_filesystem(endpoint, settings.region, *credentials.items())


def is_anonymous() -> bool:
    """Return whether no credentials were found."""
    return _settings(*environment()).credentials is None


def endpoint_hint() -> str:
    """Return ` at ENDPOINT` for an error message, or nothing for the default endpoint."""
    try:
        endpoint = _endpoint(*environment())
    except CappyError:
        endpoint = None
    return f" at {endpoint}" if endpoint else ""


@lru_cache(maxsize=8)
def _settings(*environment: str) -> _Settings:
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        session = boto3.session.Session()
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        return _Settings(session, region, session.get_credentials())
    except BotoCoreError as error:
        raise CappyError(
            f"the AWS settings cannot be used ({first_line(error)}); check AWS_PROFILE={os.environ.get('AWS_PROFILE', '')}, the files in "
            f"~/.aws and the AWS_ variables"
        ) from None


@lru_cache(maxsize=8)
def _new_client(attempts: int, *environment: str) -> Any:
    """Return one client for each environment: making a client takes as long as about a hundred calls."""
    from botocore import UNSIGNED
    from botocore.config import Config as BotoConfig

    settings = _settings(*environment)
    retries: Any = {"total_max_attempts": attempts, "mode": "standard"}
    options = BotoConfig(retries=retries, connect_timeout=10, read_timeout=60, max_pool_connections=_CONNECTIONS)
    if settings.credentials is None:
        options = options.merge(BotoConfig(signature_version=UNSIGNED))
    try:
        return settings.session.client("s3", region_name=settings.region, config=options)
    except ValueError as error:
        raise CappyError(f"the endpoint of S3 is not a URL ({first_line(error)}); check AWS_ENDPOINT_URL, e.g. http://host:9000") from None


def _endpoint(*environment: str) -> str | None:
    """Return the endpoint that the environment or the AWS config file sets; None for the default endpoint of the region."""
    endpoint = str(_new_client(1, *environment).meta.endpoint_url)
    return None if _DEFAULT_ENDPOINT.fullmatch(endpoint) else endpoint


@lru_cache(maxsize=8)
def _new_arrow_filesystem(endpoint: str | None, region: str, *credentials: tuple[str, Any]) -> pafs.S3FileSystem:
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=5),
        **dict(credentials),
    )
