"""What Prometheus may know of a gateway: how much, how fast, how often it failed. In a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_RELEASE = ("application", "arm", "version")


class Metrics:
    """`arm` is `none` where nothing is compared: no rollout, or a pinned release."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.exchanges = Counter(
            "millrace_exchanges",
            "Exchanges by how they ended: completed, failed, left (by the client)",
            (*_RELEASE, "outcome"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "millrace_exchange_seconds",
            "From request to last byte",
            _RELEASE,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 2, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.tokens = Counter("millrace_tokens", "Tokens computed", (*_RELEASE, "kind"), registry=self.registry)
        self.cached = Counter("millrace_cached_answers", "Answers from the cache", _RELEASE, registry=self.registry)
        self.fallbacks = Counter(
            "millrace_fallbacks", "Answers of the champion for a failed challenger", _RELEASE, registry=self.registry
        )
        self.traces = Counter(
            "millrace_traces",
            "Exchanges offered to MLflow as traces: sent, dropped (no room, or no MLflow)",
            ("application", "outcome"),
            registry=self.registry,
        )
        self.feedback = Counter("millrace_feedback", "Feedback taken", ("application",), registry=self.registry)
        self.refusals = Counter("millrace_refusals", "Requests refused, by status", ("status",), registry=self.registry)
        self.at_work = Gauge("millrace_exchanges_at_work", "Exchanges running or waiting", registry=self.registry)
