"""Free ports for the servers that tests start."""

import socket


def free_ports(count: int) -> list[int]:
    """Free ports p for which p + 10000 is free too: weed puts its gRPC port there."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            try:
                high.bind(("127.0.0.1", port + 10000))
            except (OSError, OverflowError):
                continue
        if port not in ports:
            ports.append(port)
    return ports
