"""Measurements of stored KV: what it saves, what storing it costs."""
