"""Prometheus metrics of one worker process, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """The counters; `exposition()` is what Prometheus scrapes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "brownout_requests",
            "Requests by route and status.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "brownout_request_seconds",
            "Time until the response ended.",
            ("route",),
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            registry=self.registry,
        )
        self.reports = Counter(
            "brownout_device_reports",
            "Deployment status reports by status.",
            ("status",),
            registry=self.registry,
        )
        self.downloaded = Counter(
            "brownout_artifact_sent_bytes", "Artifact bytes sent.", registry=self.registry
        )
        self.uploads = Counter(
            "brownout_artifact_uploads", "Uploads by outcome.", ("outcome",), registry=self.registry
        )
        self.open_requests = Gauge(
            "brownout_open_requests", "Requests being answered.", registry=self.registry
        )
        self.devices = Gauge(
            "brownout_devices", "Devices by status.", ("status",), registry=self.registry
        )
        self.deployments = Gauge(
            "brownout_deployments", "Deployments by status.", ("status",), registry=self.registry
        )
        self.job_failures = Counter(
            "brownout_job_failures", "Background jobs that failed.", registry=self.registry
        )

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
