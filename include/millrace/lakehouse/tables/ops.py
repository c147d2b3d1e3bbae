"""What Millrace itself did and decided, and what it refused: journals, evaluations, costs, cursors, quarantine."""

import pyarrow as pa

from millrace.lakehouse.tables.declared import Table, count, flag, number, text, time

PLATFORM = "_platform"
"""The application whose tables hold what belongs to an environment as a whole."""

OPS_DECISIONS = Table(
    "ops",
    "decisions",
    (
        count("sequence"),  # 0, 1, 2 …, no gaps
        time("decided_at"),
        text("kind"),  # see rollout/decisions.py
        text("actor"),
        text("reason"),
        text("rollout_id", nullable=True),
        count("epoch", nullable=True),
        text("champion", nullable=True),  # release version
        text("challenger", nullable=True),
        number("share"),  # of traffic that the challenger gets from now on
        text("evidence"),  # JSON
        flag("simulated"),  # rests on simulated users
    ),
    key=("sequence",),
    retention_days=3650,
)

OPS_EVALUATIONS = Table(
    "ops",
    "evaluations",
    (
        text("evaluation_id"),  # hash of set, champion, candidate and index build
        text("evaluation_set"),
        text("champion"),
        text("candidate"),
        text("candidate_release_id"),
        text("champion_release_id"),
        text("index_build"),
        flag("passed"),
        text("criteria"),  # JSON: list of criterion, value, interval, bound, passed
        text("examples"),  # JSON: per example scores of both, worst first
        time("evaluated_at"),
    ),
    key=("evaluation_id",),
    retention_days=3650,
)

OPS_PROMOTIONS = Table(
    "ops",
    "promotions",
    (
        text("promotion_id"),  # of the run that promotes
        text("step"),  # approved, rejected, copied, rebuilding
        time("at"),
        text("actor"),
        text("reason"),
        text("source"),  # environment that the release is from
        text("source_version"),
        text("release_id"),  # there
        text("way"),  # models, code
        text("commit", nullable=True),  # of the code that made it
        text("recipe", nullable=True),  # JSON: what makes it again, where something does
        text("version", nullable=True),  # here, where it was copied
    ),
    key=("promotion_id", "step"),
    retention_days=3650,
)

OPS_PROMPT_TRIALS = Table(
    "ops",
    "prompt_trials",
    (
        text("study"),  # hash of champion, index build, questions, choices and budgets
        text("part"),  # search; held_out: the start or the best, on questions that no trial was chosen by
        count("trial"),  # 0: the champion's own prompt and configuration
        text("parameters"),  # JSON
        text("template"),  # whole, worked examples and all
        text("state"),  # complete, pruned, failed
        count("questions"),  # answered
        number("token_f1", nullable=True),  # mean over them; null: none was answered
        count("prompt_tokens"),
        count("completion_tokens"),
        number("seconds"),
        text("scores"),  # JSON: question id → token-F1
        text("why"),
        text("champion_release_id"),
        text("index_build"),
        time("ended_at"),
    ),
    key=("study", "part", "trial"),
)

OPS_CURSORS = Table(
    "ops",
    "cursors",
    (text("reader"), text("table"), count("version")),
    key=("reader", "table"),
)

OPS_ALERTS = Table(
    "ops",
    "alerts",
    (
        text("title"),
        text("content_hash"),
        text("what"),  # as it was said last
        text("source"),
        text("runbook"),
        time("since"),
        time("last_at"),
        count("count"),
        time("sent_at", nullable=True),  # when it last reached somebody
    ),
    key=("title",),
)

OPS_AUDIT = Table(
    "ops",
    "audit",
    (
        count("sequence"),  # 0, 1, 2 …, no gaps
        text("month"),  # in which the entry was appended, 2026-11; never earlier than the entry's before
        text("event_id"),  # the same event is one entry
        time("occurred_at"),
        text("actor"),  # service/…, person/…, key/…, or user/<pseudonym>
        text("action"),  # see lakehouse/audit/chain.py
        text("application"),
        text("resource"),  # what it was done to, or the journal's row that tells
        text("release_id", nullable=True),
        text("release_version", nullable=True),
        text("outcome"),
        text("details"),  # JSON, keys sorted, no white space
        text("run"),  # that did it, not that wrote this entry
        text("previous_hash"),
        text("hash"),  # of all columns above, see lakehouse/audit/chain.py
    ),
    key=("sequence",),
    partition_by=("month",),
    append_only=True,
    retention_days=3650,
)

OPS_ERASURES = Table(
    "ops",
    "erasures",
    (
        text("user"),  # keyed pseudonym
        text("content_hash"),
        time("until"),  # what this user did up to then is erased, also if it arrives later
        time("done_at", nullable=True),  # null: there is more to do
        pa.field("completions", pa.list_(pa.string()), nullable=False),  # hashes of their ids: feedback names no user
        text("told"),  # JSON: how much of what was erased, and what was trained on it, questions as keyed hashes
    ),
    key=("user",),
    retention_days=3650,
)

OPS_ENVIRONMENT = Table(
    "ops",
    "environment",
    (
        time("described_at"),
        text("commit"),  # empty: nobody knows
        text("content"),  # JSON: settings, secrets as a few bits of a slow hash, declarations, logins
    ),
    key=("described_at",),
    retention_days=3650,
)

OPS_BREACHES = Table(
    "ops",
    "breaches",
    (
        pa.field("date", pa.date32(), nullable=False),  # of the window
        text("breach_id"),  # hash of window, release and bound
        time("interval_start"),
        time("interval_end"),
        text("release_id"),  # -: users' questions; rollout …: of a challenger that answered nobody
        text("release_version"),
        text("metric"),
        text("bound"),
        number("value"),
        text("action"),  # alert, retrain, reembed, rollback
        text("reason"),
        flag("simulated"),  # rests on simulated users
        time("at"),  # when it was found
    ),
    key=("date", "breach_id"),
    partition_by=("date",),
    retention_days=3650,
)

OPS_COSTS = Table(
    "ops",
    "costs",
    (
        text("cost_id"),
        text("content_hash"),
        text("stage"),  # embedding, training, evaluation, optimisation, batch
        text("subject"),  # what it was spent on: lineage, fine-tune, evaluation, study, question table
        text("release_id", nullable=True),
        number("seconds"),  # of a machine
        count("tokens"),
        number("cost_usd"),
        time("at"),
    ),
    key=("cost_id",),
    retention_days=3650,
)

QUARANTINE_FEEDBACK = Table(
    "quarantine",
    "feedback",
    (
        text("item_id"),  # event id, or segment and offset of a line that can't be read
        text("reason"),
        text("payload"),  # the line as it was found, replayable
        text("segment"),
        time("found_in"),  # start of the data interval
    ),
    key=("item_id",),
)
