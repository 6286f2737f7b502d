import socket

import pytest

from cluster import ports
from cluster.errors import CappyError, UsageError


def test_a_free_port_can_be_listened_on_and_a_taken_one_is_named():
    port = ports.free_port()
    assert ports.is_free("127.0.0.1", port)
    ports.check_port("127.0.0.1", port, "serving.")
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(CappyError, match=rf"^serving\.port={port} is in use on 127\.0\.0\.1; stop the other server or set"):
            ports.check_port("127.0.0.1", port, "serving.")
        assert ports.free_port() != port
        assert not ports.is_free("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "message"),
    [("no.such.host.invalid", "is not an address; use 127.0.0.1"), ("192.0.2.99", "cannot be bound: Cannot assign requested address")],
)
def test_a_host_that_is_not_this_machines_is_refused(host, message):
    with pytest.raises(UsageError, match=rf"^generate\.metrics_host={host} {message}"):
        ports.check_port(host, ports.free_port(), "generate.metrics_")
