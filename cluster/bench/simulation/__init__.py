"""A pipeline of simulated stages and a simulated clock under the real scheduler."""
