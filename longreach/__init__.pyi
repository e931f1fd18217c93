# What type checkers see: every name of `cluster`.
from cluster import *  # noqa: F403
