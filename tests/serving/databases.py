"""A database of a real PostgreSQL that a test may ask directly, and send away."""

from typing import Any, Self

import psycopg2


class Database:
    """`url` is SQLAlchemy's; `admin_url` is that of a database on the same server that stays."""

    def __init__(self, name: str, url: str, admin_url: str) -> None:
        self.name = name
        self.url = url
        self._admin = connected(admin_url)
        self._admin.autocommit = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._admin.close()

    def go_away(self) -> None:
        """End every connection and take no other."""
        self._do(f'alter database "{self.name}" allow_connections false')
        self._do(f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{self.name}'")

    def come_back(self) -> None:
        self._do(f'alter database "{self.name}" allow_connections true')

    def run(self, sql: str) -> list[tuple[Any, ...]]:
        connection = connected(self.url)
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            rows = cursor.fetchall() if cursor.description else []
        connection.close()
        return rows

    def _do(self, sql: str) -> None:
        with self._admin.cursor() as cursor:
            cursor.execute(sql)


def connected(url: str) -> "psycopg2.extensions.connection":
    return psycopg2.connect(url.replace("+psycopg2", ""))
