"""Faults put into a running head from outside, and how their effect is judged; `python -m cluster.bench faults`."""
