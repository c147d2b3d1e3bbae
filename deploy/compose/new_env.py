"""Prints the named file of `NAME=` lines with a new secret behind every name that has none. Needs Python alone."""

import base64
import secrets
import sys
from pathlib import Path


def new_secret(name: str) -> str:
    """Of characters that need no quoting in a file or an address; a Fernet key is 32 bytes in base64."""
    if name.endswith("FERNET_KEY"):
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    return secrets.token_urlsafe(64)


if __name__ == "__main__":
    for line in Path(sys.argv[1]).read_text().splitlines():
        name = line.removesuffix("=")
        print(line + new_secret(name) if name != line and not line.startswith("#") else line)
