"""The sample, and a data scientist in dev, where the walls are a real S3 server's: each by its own credential."""

import os
import subprocess
import sys

import pytest

from millrace.applications import Application, load_application
from millrace.environments.sample_copy import copy_documents, copy_evaluation_sets, copy_exchanges
from millrace.errors import AccessRefused, SampleError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.places import SAMPLE
from millrace.lakehouse.tables import SILVER_DOCUMENTS, SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.settings import PROJECT, Settings
from millrace.stack.environment import settings_variables
from tests.conftest import DECLARATIONS
from tests.environments.conftest import As
from tests.environments.production import fill_prod, publish

pytestmark = pytest.mark.long


@pytest.fixture
def application(settings: Settings) -> Application:
    return load_application(settings.model_copy(update={"applications": DECLARATIONS}), "qa")


def test_staging_gets_prods_sample_with_its_own_credential_and_reads_and_writes_nothing_else_of_prod(
    lake_as: As, application: Application
) -> None:
    prod = fill_prod(lake_as("prod"), application, users=90)
    staging = lake_as("staging")
    for stage in (copy_evaluation_sets, copy_documents, copy_exchanges):
        with pytest.raises(SampleError, match=r"run qa\.publish_sample in prod first"):
            stage(staging, application, run="test")
    assert all(told["changed"] for told in publish(prod, application).values())
    assert not any(told["changed"] for told in publish(prod, application).values())
    for stage in (copy_evaluation_sets, copy_documents, copy_exchanges):
        assert stage(staging, application, run="test")["changed"], stage
        assert not stage(staging, application, run="test")["changed"], stage
    ours, shown = Lake.of(staging, "qa"), Lake.of(staging, "qa", environment=SAMPLE)
    theirs = Lake.of(prod, "qa")
    for table in (SILVER_DOCUMENTS, SILVER_EXCHANGES, SILVER_FEEDBACK):
        assert 0 < ours.read(table).num_rows == shown.read(table).num_rows < theirs.read(table).num_rows
        with pytest.raises(
            AccessRefused, match=f"does not let lake-staging read s3://walled/lake/prod/qa/{table.path}"
        ):
            Lake.of(staging, "qa", environment="prod").read(table)
    # Past the code's wall there is the server's.
    nothing = SILVER_FEEDBACK.rows_schema.empty_table()
    for lake in (shown, Lake.of(staging, "qa", environment="prod")):
        where = lake.uri(SILVER_FEEDBACK)
        with pytest.raises(AccessRefused, match=r"does not let lake-staging (write|read) s3://walled/lake/"):
            LocalEngine().merge(where, SILVER_FEEDBACK, nothing, run="test", delete_unmatched="true")
    with pytest.raises(AccessRefused, match="does not let lake-dev read s3://walled/lake/sample/"):
        Lake.of(lake_as("dev"), "qa", environment=SAMPLE).read(SILVER_FEEDBACK)


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
