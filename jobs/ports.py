"""TCP ports of this machine: which are free, and some that stay so until they are used."""

import random
import socket
from collections.abc import Collection

LOOPBACK = "127.0.0.1"
# Below what Linux and others give to outgoing connections, above what Ray gives to its workers:
# a port from here is still free when a server that takes a while to start binds it.
FIRST, LAST = 20_000, 22_700
# Weed listens for gRPC at this distance from each of its ports.
GRPC_DISTANCE = 10_000


def free_ports(count: int, *, but: Collection[int] = ()) -> list[int]:
    """Different ports of loopback that nobody listens on, nor at their gRPC distance.

    but: ports that are given away and perhaps not taken yet.
    """
    ports: list[int] = []
    draw = random.SystemRandom()
    while len(ports) < count:
        port = draw.randint(FIRST, LAST)
        if (
            port not in ports
            and port not in but
            and is_free(port)
            and is_free(port + GRPC_DISTANCE)
        ):
            ports.append(port)
    return ports


def is_free(port: int) -> bool:
    """Whether nobody listens on a port of loopback."""
    with socket.socket() as probe:
        # As servers do: what has just been closed may be taken again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
