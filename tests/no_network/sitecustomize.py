"""On PYTHONPATH while the chapters run: no process may reach another machine."""

import socket

_connect = socket.socket.connect


def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
        "127.0.0.1",
        "::1",
        "localhost",
    ):
        raise OSError(
            "the book runs without a network, and something tried to reach"
            f" {address[0]}"
        )
    return _connect(self, address)


socket.socket.connect = connect
