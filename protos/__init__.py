"""The contract between the planes: messages, protobuf, and what both must know of a checkpoint."""
