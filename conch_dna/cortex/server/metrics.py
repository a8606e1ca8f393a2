"""What the server counts, for Prometheus.

Knows prometheus_client; nothing of HTTP or models. A registry of its own, so that several servers
can be in one process. Another figure: a metric here, counted by whoever sees it happen.
"""

from collections.abc import Callable, Iterator
from typing import Any

from conch_dna.cortex.answer import Answer
from conch_dna.cortex.calibration.drift import Finding

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds; a token of a small model takes milliseconds, an answer of EGO minutes.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """Counters and histograms of one server; any thread may use them.

    Args:
        unfinished: How many requests wait or are answered.
        computed: How many of these are in the engine.
        drift: What live answers say against calibration, with the model of each.

    Attributes:
        first_text: Seconds to the first text of an answer, by model.
        reloads: How often a domain got another adapter.
    """

    def __init__(
        self,
        *,
        unfinished: Callable[[], int],
        computed: Callable[[], int],
        drift: Callable[[], list[tuple[str, Finding]]],
    ) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self.registry, "namespace": "conch_dna"}
        self._requests = Counter(
            "requests",
            "Requests for answers or embeddings by model and HTTP status.",
            ["model", "status"],
            **more,
        )
        self._hand_overs = Counter(
            "hand_overs", "Questions to a neuron that EGO answered.", ["model"], **more
        )
        self._tokens = Counter("tokens", "Tokens read and written.", ["model", "kind"], **more)
        self._ego_tokens = Counter(
            "ego_tokens", "Tokens of EGO's answers that were drafted.", ["model"], **more
        )
        self._ego_steps = Counter("ego_steps", "EGO's steps for these tokens.", ["model"], **more)
        self.reloads = Counter("adapter_reloads", "Adapters taken in anew.", ["model"], **more)
        self.first_text = Histogram(
            "first_text_seconds",
            "From the request to the first text of its answer.",
            ["model"],
            buckets=_BUCKETS,
            **more,
        )
        self._duration = Histogram(
            "request_seconds",
            "From the request to the end of its answer.",
            ["model"],
            buckets=_BUCKETS,
            **more,
        )
        Gauge("unfinished_requests", "Requests that wait or are answered.", **more).set_function(
            unfinished
        )
        Gauge("engine_requests", "Of these, the ones in the engine.", **more).set_function(computed)
        self.registry.register(_DriftFigures(drift))

    def ended(self, model: str, status: int, seconds: float) -> None:
        """A request is over; 499 where the client had gone."""
        self._requests.labels(model, str(status)).inc()
        if status == 200:
            self._duration.labels(model).observe(seconds)

    def answered(self, model: str, answer: Answer, *, handed_over: bool) -> None:
        """There is a whole answer, EGO's in a neuron's place where it was handed over."""
        self._tokens.labels(model, "prompt").inc(answer.prompt_tokens or 0)
        self._tokens.labels(model, "completion").inc(answer.completion_tokens or 0)
        if answer.ego_tokens is not None and answer.ego_steps is not None:
            self._ego_tokens.labels(model).inc(answer.ego_tokens)
            self._ego_steps.labels(model).inc(answer.ego_steps)
        if handed_over:
            self._hand_overs.labels(model).inc()

    def embedded(self, model: str, tokens: int) -> None:
        """There are the embeddings of a request's texts, which have so many tokens."""
        self._tokens.labels(model, "prompt").inc(tokens)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class _DriftFigures:
    """Gauges of drift, made when they are asked for: of models that are calibrated then."""

    def __init__(self, drift: Callable[[], list[tuple[str, Finding]]]) -> None:
        self._drift = drift

    def collect(self) -> Iterator[Any]:
        """As prometheus_client asks for them."""
        from prometheus_client.metrics_core import GaugeMetricFamily

        figures: dict[str, tuple[str, Callable[[Finding], float | None]]] = {
            "drift_share_expected": (
                "Share of hand-overs, or of probability under the mask, at calibration.",
                lambda each: each.expected.mean,
            ),
            "drift_share": ("The same of live answers since then.", lambda each: each.live),
            "drift_share_recent": (
                "The same of the last hundred of them.",
                lambda each: each.recent,
            ),
            "drift_answers": ("Live answers counted.", lambda each: each.answers),
            "drift": (
                "Whether live answers are of another kind than at calibration.",
                lambda each: bool(each.drifted),
            ),
        }
        found = self._drift()
        for name, (text, value) in figures.items():
            family = GaugeMetricFamily(f"conch_dna_{name}", text, labels=["model", "kind"])
            for model, each in found:
                if (figure := value(each)) is not None:
                    family.add_metric([model, each.kind], float(figure))
            yield family
