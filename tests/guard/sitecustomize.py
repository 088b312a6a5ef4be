"""First thing in the test server's Python: no connection to another machine can be made, and each attempt is noted.

The file named by DREAM4D_TEST_CONNECTIONS gets one JSON line per attempt: where to, and from where in the code.
"""

import json
import os
import socket
import traceback

_NOTES = os.environ.get("DREAM4D_TEST_CONNECTIONS")
_HERE = {"localhost", "127.0.0.1", "0.0.0.0", "::1", "::", "", None}


def _refuse(where):
    with open(_NOTES, "a", encoding="utf-8") as file:
        file.write(json.dumps({"to": repr(where), "from": traceback.format_stack()[:-2]}) + "\n")
    raise OSError(f"the tests' server must not reach {where!r}")


def _guarded(method):
    def connect(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _HERE:
            _refuse(address)
        return method(self, address, *rest)

    return connect


def _guarded_lookup(host, *rest, **options):
    name = host.decode() if isinstance(host, bytes) else host
    if name not in _HERE:
        _refuse(name)
    return _LOOKUP(host, *rest, **options)


if _NOTES:
    _LOOKUP = socket.getaddrinfo
    socket.getaddrinfo = _guarded_lookup
    socket.socket.connect = _guarded(socket.socket.connect)
    socket.socket.connect_ex = _guarded(socket.socket.connect_ex)
