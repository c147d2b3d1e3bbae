"""The audit trail of an environment: `ops/audit` of the application `_platform`, appended to and never changed.

Here is what appends (`chain.py`), what is known of the trail's end outside of it (`head.py`), what carries the
journals over (`journals.py`) and what counts the uses of keys (`key_uses.py`): below the rooms that decide, which
call it. Who reads the trail, and whether it is whole, is `environments/audit.py`'s.
"""
