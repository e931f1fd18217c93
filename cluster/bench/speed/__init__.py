"""Time to first token, decode, scaling and peers, measured in repeats on a watched machine: `longreach bench`."""
