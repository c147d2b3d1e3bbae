"""Names for content: the same values give the same hash, on every machine and in every run."""

import hashlib


def content_hash(*parts: str | bytes | int | None) -> str:
    """Hash of a sequence of values, as 32 hexadecimal digits (128 bits of SHA-256).

    Each part is marked with its kind and length, so that no two different sequences read the same.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = b"" if part is None else part if isinstance(part, bytes) else str(part).encode()
        digest.update(f"{type(part).__name__}:{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()[:32]
