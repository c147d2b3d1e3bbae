"""The report of a turn that lies in real tables, judged by the rollout's own code."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from millrace.airflow_api import Airflow
from millrace.applications import Application, load_application
from millrace.demo.progress import Progress, Stage
from millrace.demo.report import build_report, write_report
from millrace.demo.report_model import Report
from millrace.demo.teller import Teller
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES
from millrace.settings import Settings
from tests.demo.turn import MEANS, STAGES, STARTED, Turn

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Application, Report]:
    settings = Settings(
        home=tmp_path_factory.mktemp("home"), pace="demo", spark_tables=frozenset(), completion_key="a test's"
    )
    application = load_application(settings, "qa")
    turn = Turn(Lake.of(settings, "qa"), application)
    turn.tell()
    turn.week(settings)
    return settings, application, build_report(settings, application, STAGES, STARTED, memory_peak_bytes=7 * 2**30)


def test_the_first_sentence_says_what_came_of_it(told):
    _, _, report = told
    bad = report.rollouts[1]
    assert report.headline.startswith("Version 2 replaced version 1: token-F1 0.")
    assert report.headline.endswith(
        f"Version 3, which the gate had refused, was rolled back after {bad.users_on_challenger} of {bad.users} "
        "simulated users had met it."
    )


def test_champions_before_and_after_come_with_their_scores_from_the_evaluation_that_compared_them(told):
    before, after = told[2].champion_before, told[2].champion_after
    assert (before.version, after.version) == ("1", "2")
    assert before.evaluation_id == after.evaluation_id == "eval-1-2"
    for entry in (before, after):
        assert entry.quality.low < entry.quality.estimate < entry.quality.high
        assert entry.examples == 60
    quality = next(c for c in told[2].gates[0].criteria if c.name == "quality")
    assert (before.quality.estimate, after.quality.estimate) == pytest.approx((quality.champion, quality.candidate))


def test_the_terminal_says_which_criteria_were_not_met(told):
    settings, application, _ = told
    teller = Teller(settings, application, Airflow(settings.airflow_url, "", ""), Progress(()))
    refused = teller.verdict("3", "2")

    assert str(teller.verdict("2", "1")) == "passed"
    assert str(refused) == "refused (quality)"
    assert refused.quality_lost == pytest.approx(MEANS["2"] - MEANS["3"], abs=0.1)
    assert teller.verdict("3", "1") is None


def test_a_rollout_tells_its_decisions_its_evidence_and_who_met_the_challenger(told):
    good, bad = told[2].rollouts
    assert [d.kind for d in good.decisions if d.kind != "hold"] == ["start", "advance", "promote"]
    assert (bad.outcome, bad.decisions[-1].share, bad.gate_passed) == ("rollback", 0.0, False)
    assert bad.admitted == "demo: injected regression, let past the gate on purpose"
    assert 0 < bad.users_on_challenger < bad.users
    assert bad.share_on_challenger == bad.users_on_challenger / bad.users
    for rollout in (good, bad):
        assert rollout.simulated
        assert {g.name for g in rollout.guardrails} >= {"quality", "success", "latency"}
        for guardrail in rollout.guardrails:
            assert len(guardrail.points) == len(rollout.decisions) - 1  # a start rests on no evidence
    quality = next(g for g in bad.guardrails if g.name == "quality").points[-1]
    assert quality.high < 0
    assert quality.challenger_mean < quality.champion_mean


def test_costs_add_up_over_releases_and_are_those_of_the_exchanges(told):
    costs = told[2].costs
    stages = {line.name: line for line in costs.by_stage}
    assert stages.keys() == {"serving", "training"}
    for lines in (costs.by_release, costs.by_stage):
        assert sum(line.cost_usd for line in lines) == pytest.approx(costs.total_usd)
    assert {line.version for line in costs.by_release} == {"1", "2", "3"}
    assert stages["serving"].simulated == stages["serving"].uses
    assert (stages["training"].seconds, stages["training"].cost_usd) == (512.4, 0.01)


def test_a_study_says_what_was_tried_and_whether_the_best_is_better(told):
    (study,) = told[2].studies
    assert [(t.trial, t.template, t.state) for t in study.trials] == [
        (0, "its own", "complete"),
        (1, "template 1", "complete"),
        (2, "template 2", "pruned"),
    ]
    assert (study.best, study.held_out, study.tokens) == (1, 20, 309 * (3 * 16 + 2 * 20))
    assert study.difference.estimate == pytest.approx(study.best_f1 - study.start_f1)
    assert study.difference.low < study.difference.estimate < study.difference.high


def test_the_monitor_counts_every_exchange_and_tells_what_broke_its_bounds(told):
    settings, _, report = told
    there = Lake.of(settings, "qa").read(SILVER_EXCHANGES).num_rows
    assert sum(one.exchanges for one in report.metrics) == there
    assert [one.version for one in report.metrics] == ["1", "2", "3"]
    assert all(one.simulated == one.exchanges for one in report.metrics)
    (batch,) = report.batches
    assert (batch.version, batch.answers, batch.errors, batch.tokens) == ("2", 20, 0, 20 * 309)
    assert {breach.version for breach in report.breaches} == {"1", "2"}
    assert {alert.title for alert in report.alerts} == {
        f"qa: version {breach.version}: {breach.bound}" for breach in report.breaches
    }


def test_the_report_says_what_this_pace_changes(told):
    fields = {difference.field for difference in told[2].pace_differences}
    assert {"rollout.steps", "rollout.window_seconds", "gate.max_examples"} <= fields


def test_the_json_is_the_report_and_the_page_needs_nothing_but_itself(told):
    settings, _, report = told
    data, page = write_report(settings, report)
    assert Report.model_validate_json(data.read_text()) == report
    assert json.loads(data.read_text())["format"] == 2
    seen = _Page.of(page)
    assert seen.fetched == []
    assert seen.tags.count("svg") == 4 + 10  # two plots a rollout, a ruler a criterion
    assert "Every user in this report is a program" in seen.text
    # On the page, in every rollout: title, both plots, both tables.
    assert seen.text.count("simulated users") > 2 * 5
    assert "<b>What</b> is the default?" in seen.text  # an answer is text, whatever it holds
    assert [path.name for path in settings.home.glob(".report*")] == []


def test_a_turn_that_left_nothing_is_told_too(settings: Settings, qa: Application):
    stages = [Stage("documents", "failed", "no chunk reached silver/chunks", started=0.0, ended=3.0), Stage("index")]
    report = build_report(settings, qa, stages, STARTED)
    assert report.headline == ("Stage “documents” failed: no chunk reached silver/chunks. There is no champion.")
    _, page = write_report(settings, report)
    text = _Page.of(page).text
    for said in ("Nothing was rolled out", "No study was held", "No table of questions", "The monitor did not run"):
        assert said in text


def test_a_second_turn_in_which_nothing_was_new_says_that_the_champion_stays(told):
    settings, application, report = told
    later = max(rollout.ended_at for rollout in report.rollouts).replace(year=2027)
    second = build_report(settings, application, [Stage("gate", "nothing new", started=0.0, ended=1.0)], later)
    assert second.headline == "Version 2 stays champion; nothing was a candidate."
    assert (second.gates, second.rollouts) == ([], [])
    assert second.champion_before == second.champion_after


def test_a_page_can_be_written_while_a_rollout_is_still_undecided(settings: Settings, qa: Application, lake: Lake):
    turn = Turn(lake, qa)
    turn.decide("bootstrap", "the first registered release", champion="1")
    turn.decide("start", "passed", rollout_id="r", epoch=1, challenger="2", share=0.25)
    report = build_report(settings, qa, [], STARTED)
    assert (report.rollouts[0].outcome, report.rollouts[0].ended_at) == ("running", None)
    _, page = write_report(settings, report)
    assert "still running" in _Page.of(page).text


class _Page(HTMLParser):
    """What a page shows, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    @classmethod
    def of(cls, path: Path) -> "_Page":
        page = cls()
        page.feed(path.read_text())
        return page

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attributes)
        if tag == "script" or any(name in found for name in ("src", "href", "xlink:href")):
            self.fetched.append(f"{tag} {found}")

    def handle_data(self, data: str) -> None:
        self.text += data
