#!/bin/sh
# Run by the image of Postgres when its data directory is new: a database and a role of its own for each that needs one.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
    --set airflow="$AIRFLOW_DATABASE_PASSWORD" --set mlflow="$MLFLOW_DATABASE_PASSWORD" \
    --set gateway="$GATEWAY_DATABASE_PASSWORD" <<'SQL'
CREATE ROLE airflow LOGIN PASSWORD :'airflow';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE ROLE gateway LOGIN PASSWORD :'gateway';
CREATE DATABASE airflow OWNER airflow;
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE gateway OWNER gateway;
REVOKE CONNECT ON DATABASE airflow FROM PUBLIC;
REVOKE CONNECT ON DATABASE mlflow FROM PUBLIC;
REVOKE CONNECT ON DATABASE gateway FROM PUBLIC;
SQL
