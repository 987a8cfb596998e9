"""Free ports for processes that begin to listen only seconds after they are told where."""

import random
import socket

_PORTS = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Different ports of this machine on which nothing listens.

    They lie below those that systems give out by themselves, from 32,768 on: such a port may be
    taken in the meantime by any connection, and a cluster begins hundreds. Others who ask here at
    the same time hardly get the same, as the choice is random.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"less than {count} ports from {_PORTS.start} to {_PORTS.stop - 1} are free")
