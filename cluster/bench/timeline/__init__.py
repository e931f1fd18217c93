"""When every shard worked on every chunk of a prompt, and what that says."""
