"""A Ray cluster of this machine alone, which nobody else may use.

Whoever may speak to Ray may run code as its user. So what a local cluster listens on are ports of
the loopback interface, and they ask for a token that was made for this run. The token stands in
the environment of this process and of those that it starts, which other users cannot read: in no
file, and on no command line.
"""

import os
import secrets
import sys
from pathlib import Path

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0 tells Ray to count on no other machine, as it does on macOS and Windows: then a node's address
is the loopback interface's, and on that alone it listens. Ray reads it when it is imported."""

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def listen_on_loopback() -> None:
    """What Ray starts for this process listens on this machine only.

    To be called before Ray is imported; later it does nothing, and the token alone is the guard.
    """
    os.environ.setdefault(LOOPBACK, "0")


def ask_for_token() -> None:
    """What Ray starts here asks for a token of this run, unless the user said otherwise."""
    mode = os.environ.get(MODE)
    if TOKEN in os.environ or TOKEN_PATH in os.environ or mode not in (None, "token"):
        return
    if mode == "token" and (Path.home() / ".ray" / "auth_token").exists():
        return  # it is asked for by name, and this is where Ray keeps it
    os.environ[TOKEN] = secrets.token_hex(32)
    if "ray" not in sys.modules:  # later only Ray itself can: it does where it starts a local one
        os.environ[MODE] = "token"
