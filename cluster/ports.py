"""Hosts and ports of this machine: check a port, find a free port, and recognise loopback addresses. Starts no server."""

from __future__ import annotations

import errno
import ipaddress
import socket

from cluster.errors import CappyError, UsageError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Names and addresses of this machine for itself."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int, settings: str) -> None:
    """Check that a server can listen at `host` and `port`. `settings` is the prefix of the two settings, e.g. `serving.`.

    Raises `CappyError` if the port is in use, and `UsageError` if the host is not an address of this machine or the port needs root.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As servers do: ignore connections of an earlier server that are still closing.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise UsageError(f"{settings}host={host} is not an address; use 127.0.0.1, or an address of this machine") from None
    except PermissionError:
        raise UsageError(f"{settings}port={port} needs root; set {settings}port above 1023") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CappyError(f"{settings}port={port} is in use on {host}; stop the other server or set {settings}port") from None
        raise UsageError(f"{settings}host={host} cannot be bound: {error.strerror}; use an address of this machine") from None


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port at `host` on which nothing listens and that no connection uses."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def is_free(host: str, port: int) -> bool:
    """Return whether a server can listen at `host` and `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
