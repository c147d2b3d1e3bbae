"""A deployment's backup and its restore: databases, tables, models, index builds and events, all of one moment.

It knows what a home and the servers around it hold; it does not know what any of it means.

    store.py        where files are read and written: a folder or an object store
    repository.py   a folder of backups, whose bytes are kept once, by their hash
    databases.py    PostgreSQL's databases, by `pg_dump` and `pg_restore`
    embedded.py     the stores of the embedded stack, running alone where the stack doesn't
    delta.py        Delta tables at a version, while others go on writing
    collections.py  a Qdrant server's collections, by its snapshots
    places.py       where this deployment keeps what a backup holds
    saving.py       what is saved, and in which order
    restoring.py    a backup becomes a home again, in an empty place only
"""

from millrace.stack.backup.restoring import Restored, restore, verify
from millrace.stack.backup.saving import Saved, save

__all__ = ["Restored", "Saved", "restore", "save", "verify"]
