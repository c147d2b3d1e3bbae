"""The sample, and a data scientist in dev, where the walls are a real S3 server's: each by its own credential."""

import os
import subprocess
import sys

import pytest

from millrace.applications import Application, load_application
from millrace.environments.sample import sample_documents, sample_evaluation_sets, sample_exchanges
from millrace.errors import AccessRefused
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.tables import SILVER_DOCUMENTS, SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.settings import PROJECT, Settings
from millrace.stack.environment import settings_variables
from tests.conftest import DECLARATIONS
from tests.environments.conftest import As
from tests.environments.production import fill_prod

pytestmark = pytest.mark.long


@pytest.fixture
def application(settings: Settings) -> Application:
    return load_application(settings.model_copy(update={"applications": DECLARATIONS}), "qa")


def test_staging_samples_prod_with_its_own_credential_and_can_write_nothing_there(
    lake_as: As, application: Application
) -> None:
    fill_prod(lake_as("prod"), application, users=90)
    staging = lake_as("staging")
    for stage in (sample_evaluation_sets, sample_documents, sample_exchanges):
        assert stage(staging, application, run="test")["changed"], stage
        assert not stage(staging, application, run="test")["changed"], stage
    theirs, ours = Lake.of(staging, "qa", environment="prod"), Lake.of(staging, "qa")
    for table in (SILVER_DOCUMENTS, SILVER_EXCHANGES, SILVER_FEEDBACK):
        assert 0 < ours.read(table).num_rows < theirs.read(table).num_rows
    # Past the code's wall there is the server's.
    nothing = SILVER_FEEDBACK.rows_schema.empty_table()
    where = theirs.uri(SILVER_FEEDBACK)
    with pytest.raises(AccessRefused, match="does not let lake-staging write s3://walled/lake/prod/qa/silver/feedback"):
        LocalEngine().merge(where, SILVER_FEEDBACK, nothing, run="test", delete_unmatched="true")


@pytest.mark.model
def test_a_data_scientist_in_dev_reads_prod_and_is_refused_by_the_store(lake_as: As, application: Application) -> None:
    fill_prod(lake_as("prod"), application, users=12)
    dev = lake_as("dev").model_copy(update={"applications": DECLARATIONS, "pace": "demo"})
    version = Lake.of(dev, "qa", environment="prod").version(SILVER_FEEDBACK)
    ran = subprocess.run(
        [sys.executable, "examples/debug_an_answer.py"],
        cwd=PROJECT,
        env=os.environ | settings_variables(dev, keys=True),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "The worst answer of prod: rated 0 at" in ran.stdout
    assert ran.stdout.count("Answered here with") == 2
    assert ran.stdout.splitlines()[-1].startswith(
        "The object store refused to let this write in prod: ops/written_from_elsewhere: the object store does not let "
        "lake-dev write s3://walled/lake/prod/qa/ops/written_from_elsewhere"
    )
    assert Lake.of(dev, "qa", environment="prod").version(SILVER_FEEDBACK) == version
