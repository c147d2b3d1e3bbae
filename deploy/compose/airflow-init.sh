#!/bin/sh
# Before Airflow's services start, and safe to repeat: the home, Airflow's one user, its database, the pool.
set -eu
umask 077
python - <<'PYTHON'
import os

from millrace.settings import read_settings
from millrace.stack.home import prepare_home, write_json
from millrace.stack.parts import ADMIN, password_file

settings = read_settings()
prepare_home(settings)
password_file(settings.home).parent.mkdir(exist_ok=True, mode=0o700)
write_json(password_file(settings.home), {ADMIN: os.environ["AIRFLOW_ADMIN_PASSWORD"]})
PYTHON
airflow db migrate
# Whoever changed its slots keeps them.
airflow pools get heavy > /dev/null 2>&1 || airflow pools set heavy 1 "Tasks that fill the machine, one at a time"
