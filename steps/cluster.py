"""Whether the tasks of a run are on machines of a cluster."""

import os


def on_cluster() -> bool:
    """Whether this task runs on Kubernetes or AWS Batch, where each may be on another machine."""
    return "METAFLOW_KUBERNETES_WORKLOAD" in os.environ or "AWS_BATCH_JOB_ID" in os.environ
