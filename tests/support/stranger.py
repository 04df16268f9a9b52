"""Another user of this host, who listens at a port and keeps all that is said to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

UID = 65534
"""nobody's, so that no account has to be made."""

CODE = """
import os, socket, sys, threading
os.setgroups([])
os.setresgid(*[int(sys.argv[2])] * 3)
os.setresuid(*[int(sys.argv[2])] * 3)
try:
    server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
except OSError as error:
    print("refused", error, flush=True)
    sys.exit(1)
print("listening", server.getsockname()[1], flush=True)
REFUSAL = (b'HTTP/1.1 401 Unauthorized\\r\\nWWW-Authenticate: Basic realm="gateway"\\r\\n'
           b'Content-Type: application/json\\r\\nContent-Length: 2\\r\\n\\r\\n{}')

def serve(connection):
    with connection:
        while data := connection.recv(65536):
            os.write(1, data)
            connection.sendall(REFUSAL)

def accept():
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

threading.Thread(target=accept, daemon=True).start()
sys.stdin.read()
"""
"""It becomes the user only after the interpreter, which the user may not be able to read, has started."""


@dataclass
class Stranger:
    """What the other user has.

    Attributes:
        port: that they listen at; 0 where they could not.
        heard: all that was said to them, known once they have gone.
    """

    port: int
    heard: bytes = field(default=b"", repr=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def stranger(port: int = 0) -> Iterator[Stranger]:
    """Another user tries to listen at a port while the block lasts; 0: at any.

    Only root can play another user: the test is skipped otherwise.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with subprocess.Popen(
        [sys.executable, "-c", CODE, str(port), str(UID)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        word, *rest = process.stdout.readline().split()
        one = Stranger(int(rest[0]) if word == b"listening" else 0)
        try:
            yield one
        finally:
            one.heard = process.communicate(timeout=60)[0]
