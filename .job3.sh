cd /tmp/h/backup
.venv/bin/pytest -q -n 0 tests/releases/test_registry.py tests/rollout/test_controller.py tests/prompts/test_versions.py tests/prompts/test_cli.py tests/environments/test_walls.py tests/rollout/test_people.py
