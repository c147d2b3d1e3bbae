"""Prompts in MLflow's prompt registry: one prompt an application, a version for each template."""

from typing import Any

from millrace.applications import Application
from millrace.releases.manifest import PromptVersion
from millrace.releases.mlflow_server import found_or_none, mlflow_client
from millrace.releases.prompt import check_template
from millrace.releases.registry import RUN_TAG
from millrace.settings import Settings


def register_prompt(settings: Settings, application: Application, template: str, *, run: str) -> PromptVersion:
    """The version of `<application>.prompt` in the prompt registry with exactly this template; made if needed.

    Raises:
        ReleaseError: the template can't be used (`check_template`), or MLflow doesn't answer.
    """
    check_template(template)
    name = f"{application.name}.prompt"
    with mlflow_client(settings, f"register a version of prompt {name}") as client:
        known = _prompt_versions(settings, client, name, template)
        if not known:
            client.register_prompt(name, template, tags={RUN_TAG: run})
            known = _prompt_versions(settings, client, name, template)
        return PromptVersion(name=name, version=str(min(known)), template=template)


def _prompt_versions(settings: Settings, client: Any, name: str, template: str) -> list[int]:
    if found_or_none(settings, lambda: client.get_prompt(name)) is None:
        return []
    found, token = [], None
    while True:
        page = client.search_prompt_versions(name, page_token=token)
        found += [int(one.version) for one in page if one.template == template]
        token = page.token
        if not token:
            return found
