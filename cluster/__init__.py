"""The control plane: configuration, scheduling, jobs. Pure Python; never imports torch."""

from cluster.client import Client

__all__ = ["Client"]
