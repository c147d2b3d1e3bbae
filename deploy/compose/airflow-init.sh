#!/bin/sh
# Before whoever writes to the home starts, and safe to repeat: the home, brought to this version's format (as `millrace
# up` does it, so end an older version first: `docker compose --profile '*' down`), Airflow's users, its database, the pool.
set -eu
umask 077
python - <<'PYTHON'
import json
import os
import sys

from millrace.environments.access import airflow_wall
from millrace.errors import MillraceError
from millrace.settings import read_settings
from millrace.stack.home import HomeLock, bring_up_to_date, prepare_home

try:
    settings = read_settings()
    prepare_home(settings)
    lock = HomeLock(settings.home)
    if not lock.acquire():
        sys.exit(f"somebody else prepares {settings.home}; wait for them")
    bring_up_to_date(settings.home)
    passwords = json.loads(os.environ.get("AIRFLOW_PASSWORDS") or "{}")
    airflow_wall.tell(settings, airflow_wall.plan(settings, passwords), actor="service/compose")
    airflow_wall.apply(settings, passwords)
except (MillraceError, ValueError) as error:
    sys.exit(str(error))
PYTHON
airflow db migrate
# Whoever changed its slots keeps them.
airflow pools get heavy > /dev/null 2>&1 || airflow pools set heavy 1 "Tasks that fill the machine, one at a time"
