from collections import Counter

import pytest

from millrace.applications import Application
from millrace.environments.access.matrix import READS
from millrace.environments.access.mlflow_calls import Caller, Login
from millrace.environments.access.mlflow_check import check
from millrace.environments.access.mlflow_wall import apply, plan
from millrace.errors import ReleaseError
from millrace.releases.registry import versions
from millrace.settings import Settings
from tests.environments.conftest import ADMINISTRATOR, PASSWORDS, As


def test_what_is_declared_is_done_once(shared: Settings) -> None:
    assert plan(shared, ADMINISTRATOR) == []
    assert apply(shared, ADMINISTRATOR, {}) == []


def test_the_server_lets_each_identity_do_what_is_declared_and_refuses_everything_else(shared: Settings) -> None:
    observed = check(shared, PASSWORDS)
    assert [str(one) for one in observed if one.allowed != one.declared] == []
    tried = Counter((one.identity, one.environment) for one in observed)
    assert set(tried) == {(identity, environment) for identity in READS for environment in READS}
    assert set(tried.values()) == {15}
    refused = Counter((one.identity, one.environment) for one in observed if not one.allowed)
    elsewhere = {(identity, environment) for identity in READS for environment in READS if identity != environment}
    assert refused == {
        (identity, environment): 11 if environment in READS[identity] else 15 for identity, environment in elsewhere
    }
    assert plan(shared, ADMINISTRATOR) == []  # what the owners made is theirs


def test_what_was_given_by_hand_is_found_and_taken_away(shared: Settings) -> None:
    with Caller(shared, ADMINISTRATOR) as ask:
        roles = {(one["workspace"], one["name"]): one["id"] for one in ask("GET", "3.0/mlflow/roles/list")["roles"]}
        named = {"name": "handed.out"}
        ask("POST", "2.0/mlflow/users/create", json={"username": "mallory", "password": "a password of mallory"})
        ask("POST", "2.0/mlflow/registered-models/create", workspace="prod", json=named)
        for identity in ("dev", "mallory"):
            given = {"username": identity, "resource_type": "registered_model", "resource_id": "handed.out"}
            ask("POST", "3.0/mlflow/users/permissions/grant", workspace="prod", json=given | {"permission": "EDIT"})
        for identity in ("staging", "mallory"):
            ask(
                "POST",
                "3.0/mlflow/roles/assign",
                json={"username": identity, "role_id": roles["prod", "millrace-manages"]},
            )
        ask(
            "POST",
            "3.0/mlflow/roles/permissions/add",
            json={
                "role_id": roles["dev", "millrace-reads"],
                "resource_type": "workspace",
                "resource_pattern": "*",
                "permission": "USE",
            },
        )
        ask("PATCH", "2.0/mlflow/users/update-admin", json={"username": "prod", "is_admin": True})
        found = [str(change) for change in plan(shared, ADMINISTRATOR)]
        assert found[:4] == [
            "take USE on workspace * in dev from millrace-reads",
            "take EDIT on registered_model handed.out in prod from dev",
            "take role millrace-manages in prod from staging",
            "make prod no administrator",
        ]
        assert sorted(found[4:]) == [
            "take EDIT on registered_model handed.out in prod from mallory",
            "take role millrace-manages in prod from mallory",
        ]
        assert [str(change) for change in apply(shared, ADMINISTRATOR, {})] == found
        assert plan(shared, ADMINISTRATOR) == []
        ask("DELETE", "2.0/mlflow/registered-models/delete", workspace="prod", json=named)
        ask("DELETE", "2.0/mlflow/users/delete", json={"username": "mallory"})


def test_a_new_identity_needs_a_password_and_a_changed_one_ends_the_old(
    shared: Settings, ask_as: As, application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Caller(shared, ADMINISTRATOR) as ask:
        ask("DELETE", "2.0/mlflow/users/delete", json={"username": "staging"})
    with pytest.raises(ReleaseError, match=r"staging is new on .* and needs a password"):
        apply(shared, ADMINISTRATOR, {"dev": PASSWORDS["dev"]})
    apply(shared, ADMINISTRATOR, {"staging": "a first password"})
    apply(shared, ADMINISTRATOR, PASSWORDS)
    staging = ask_as("staging")
    assert versions(staging, application) == {}
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a first password")
    with pytest.raises(ReleaseError, match=r"does not know staging with this password, so I can't list the releases"):
        versions(staging, application)


def test_only_the_administrator_sees_and_changes_who_may_do_what(shared: Settings) -> None:
    dev = Login("dev", PASSWORDS["dev"])
    with pytest.raises(ReleaseError, match="answers dev with 403"):
        plan(shared, dev)
    with Caller(shared, dev) as ask:
        for workspace in READS:
            granted = {"username": "dev", "resource_type": "registered_model", "resource_id": "*"}
            answer = ask.ask(
                "POST",
                "3.0/mlflow/users/permissions/grant",
                workspace=workspace,
                json=granted | {"permission": "MANAGE"},
            )
            assert answer.status_code == 403
