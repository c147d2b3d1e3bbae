"""What the story takes the journal to say."""

import pytest

from millrace.airflow_api import Airflow
from millrace.applications import Application
from millrace.demo.progress import Progress
from millrace.demo.teller import Teller
from millrace.rollout.decisions import append
from millrace.settings import Settings
from tests.rollout.test_decisions import journal

pytestmark = pytest.mark.slow


def test_a_rollout_that_the_controller_started_before_the_story_looked_has_not_ended(
    settings: Settings, qa: Application
):
    teller = Teller(settings, qa, Airflow(settings.airflow_url, "", ""), Progress(()))
    for decision, ended in zip(journal("bootstrap", "start", "rollback"), (False, False, True), strict=True):
        append(teller.lake, decision, run="test")
        assert teller.ended("2") is ended
