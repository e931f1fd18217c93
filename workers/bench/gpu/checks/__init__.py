"""Stage `checks`: every kernel on the device against its definition, and programs that check."""
