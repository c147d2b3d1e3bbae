"""Where a secret setting comes from, if not from its own variable: a file, or a Variable of Airflow, whose secrets
backend may be a vault.

`MILLRACE_<NAME>_FILE` names a file (Docker's and Kubernetes' convention), `MILLRACE_<NAME>_VARIABLE` a Variable. Either
gives a secret that is read where it is used, not where the settings are: a file that was rotated counts from the next
use on, and a DAG file that is parsed asks no vault. It does not know which secrets there are, nor what they open.
"""

import json
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from millrace.errors import SettingsError

FROM_FILE, FROM_AIRFLOW = "_FILE", "_VARIABLE"
"""What the variable that names a source ends with."""
NO_SECRET = SecretStr("")
_SHORTEST = 6
"""Characters of a secret that is looked for in a text: a shorter one would be found where it isn't."""
_PASSWORD = re.compile(r"://[^\s/:@]*:([^\s/@]+)@")

_IN_ADDRESSES = re.compile(r"(?<=//)[^/@\s]+(?=@)|(?<=token=)[^;\s]+")
"""What an address may carry that nobody else is to know: a login, a Spark token."""

log = logging.getLogger("millrace.secrets")


class SecretFile(SecretStr):
    """The secret that a file holds now, without white space around it. Thread-safe.

    A file that has become unreadable, empty or open to everybody leaves the secret what it was, with one line in the
    log: half a rotation must not stop who works. Replace the file by a rename, so that nobody reads half of it.
    """

    def __init__(self, path: Path, name: str) -> None:
        """
        Args:
            name: of the setting, for messages.

        Raises:
            SettingsError: the file is not there, empty, no text, or everybody on this machine may read it.
        """
        self.path = path
        self.earlier: frozenset[str] = frozenset()
        """What this object has held before: it was in requests, and answers to them may still say it."""
        self._name = name
        self._seen = self._told = _stamp(path)
        super().__init__(_read(path, name))

    def get_secret_value(self) -> str:
        # Before the content: what is written meanwhile has another stamp, and is read next time.
        stamp = _stamp(self.path)
        if stamp != self._seen:
            try:
                new = _read(self.path, self._name)
            except SettingsError as error:
                # Tried again at each use: it may have failed for a reason that no stamp tells, such as no descriptor.
                if stamp != self._told:
                    log.error("%s; what it held before goes on", error)
                self._told = stamp
            else:
                self.earlier |= {self._secret_value}
                self._secret_value = new
                self._seen = self._told = stamp
        return self._secret_value


class SecretVariable(SecretStr):
    """The secret that Airflow has under a name, as its `[secrets] backend` or else its own database says. Asked at the
    first use, and kept for as long as this object: a task, which reads the settings anew, asks again."""

    def __init__(self, variable: str, name: str) -> None:
        """
        Args:
            variable: the key of Airflow's Variable.
            name: of the setting, for messages.
        """
        self.variable = variable
        self._name = name
        super().__init__("")

    def get_secret_value(self) -> str:
        """
        Raises:
            SettingsError: Airflow knows no such Variable here, or nothing is in it.
        """
        if not self._secret_value:
            from airflow.sdk.log import mask_secret

            self._secret_value = self._looked_up()
            for value in values_of(self):
                mask_secret(value)
        return self._secret_value

    @property
    def known(self) -> str:
        """What it was when it was used; empty: it wasn't yet."""
        return self._secret_value

    def _display(self) -> str:
        return "**********"  # without asking

    def _looked_up(self) -> str:
        from airflow.sdk import Variable

        found = Variable.get(self.variable, default=None)
        if not isinstance(found, str) or not found.strip():
            raise SettingsError(
                f"{self._name}{FROM_AIRFLOW} names Airflow's Variable {self.variable!r}, and Airflow has none here "
                "with anything in it; put the secret there, or correct [secrets] backend of Airflow's configuration"
            )
        return found.strip()


class SecretSources(PydanticBaseSettingsSource):
    """Secrets whose files or Variables the environment names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        name = f"{self.config['env_prefix']}{field_name}".upper()
        return _named(name) if field.annotation is SecretStr else None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """
        Raises:
            SettingsError: a secret has several sources, or its file can't be used.
        """
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


def secrets_of(settings: BaseSettings) -> list[SecretStr]:
    """All its secrets, set or not."""
    return [value for _, value in settings if isinstance(value, SecretStr)]


def variables_of(settings: type[BaseSettings]) -> set[str]:
    """The variables that may name a source."""
    prefix = settings.model_config["env_prefix"]
    secret = [name for name, field in settings.model_fields.items() if field.annotation is SecretStr]
    return {f"{prefix}{name}".upper() + source for name in secret for source in (FROM_FILE, FROM_AIRFLOW)}


def variable_for(name: str, secret: SecretStr) -> tuple[str, str]:
    """The environment variable, with its value, from which another process reads `secret` of the setting `name`."""
    if isinstance(secret, SecretFile):
        return name + FROM_FILE, str(secret.path)
    if isinstance(secret, SecretVariable):
        return name + FROM_AIRFLOW, secret.variable
    return name, secret.get_secret_value()


def is_set(secret: SecretStr) -> bool:
    """Whether it has a source. Asks no vault."""
    return isinstance(secret, SecretVariable) or bool(secret.get_secret_value())


def hide(text: str, *secrets: SecretStr) -> str:
    """`text` without the secrets, should a server have said them back."""
    for value in sorted({value for secret in secrets for value in values_of(secret)}, key=len, reverse=True):
        text = text.replace(value, "…")
    return text


def values_of(secret: SecretStr) -> set[str]:
    """What must not be seen of it: each of its lines, since some secrets are several, and what is of use without the
    rest of a line: a key without its end, one of several addresses, a password in one, a text in JSON. Asks no vault:
    what was not used yet, nobody says back.
    """
    held = {secret.known if isinstance(secret, SecretVariable) else secret.get_secret_value()}
    if isinstance(secret, SecretFile):
        held |= secret.earlier
    parts = {part for text in held for line in text.splitlines() for part in _parts(line)}
    parts |= {part for text in held for part in _texts(text)}
    return {part for part in parts if len(part) >= _SHORTEST}


def _parts(line: str) -> set[str]:
    addresses = (word for word in line.split() if "://" in word)
    return {line, line.partition(" until ")[0], *addresses, *_PASSWORD.findall(line)}


def _texts(text: str) -> set[str]:
    """The values of a JSON object, of any depth; no names. Of `access-key:secret-key` each alone, too."""
    try:
        left, found = [json.loads(text)], set[str]()
    except ValueError:
        return set()
    while left:
        match left.pop():
            case str(value):
                found |= {value, *value.split(":")}
            case dict(values):
                left += values.values()
    return found


def without_logins(text: str) -> str:
    """`text` without what its addresses carry that nobody else is to know."""
    return _IN_ADDRESSES.sub("…", text)


class WithoutSecrets(logging.Formatter):
    """A log's lines, tracebacks included, with every secret of these settings hidden."""

    def __init__(self, form: str, settings: BaseSettings) -> None:
        super().__init__(form)
        self._secrets = secrets_of(settings)

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record), *self._secrets)


def _named(name: str) -> SecretStr | None:
    """What the variables of the setting `name` refer to; None: nothing."""
    given = [name + source for source in ("", FROM_FILE, FROM_AIRFLOW) if os.environ.get(name + source)]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} are both set, and a secret has one source; unset all but one")
    if path := os.environ.get(name + FROM_FILE):
        return SecretFile(Path(path).expanduser().absolute(), name)
    if variable := os.environ.get(name + FROM_AIRFLOW):
        return SecretVariable(variable, name)
    return None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever content or permissions do; None: the file is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _read(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read().decode().strip()
    except OSError as error:
        raise SettingsError(
            f"{name}{FROM_FILE}: {path} can't be read ({error.strerror}); put the secret there, or correct the path"
        ) from None
    except UnicodeDecodeError:
        raise SettingsError(f"{name}{FROM_FILE}: {path} is no text in UTF-8; write the secret as text") from None
    if mode & stat.S_IROTH:
        raise SettingsError(
            f"{name}{FROM_FILE}: everybody on this machine may read {path}; `chmod o= {path}` (Kubernetes: defaultMode "
            "0440, Docker: mode 0400), and change the secret if others could log in"
        )
    if not content:
        raise SettingsError(f"{name}{FROM_FILE}: {path} is empty; write the secret into it")
    return content
