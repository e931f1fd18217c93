"""How the matrices of a quantised checkpoint are stored, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["gptq", "awq", "pack-quantized", "int-quantized", "float-quantized", "fp8", "gguf"]


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """What `quantization_config` says of every converted matrix; others of the checkpoint are stored plain."""

    format: Format  # those named -quantized are of compressed-tensors
    bits: int  # 4 or 8
    is_float: bool = False  # codes are FP8 e4m3, else whole numbers
    group: int = 0  # inputs that share a scale; 0: all inputs of a row
    block_rows: int = 0  # rows that share a scale; 0: every row has its own, or one is that of the whole matrix
    has_zeros: bool = False  # zero points differ, and are stored
    zero_offset: int = 0  # added to stored zero points: 1 in the first format of GPTQ
    head: bool = False  # the output matrix is converted too, not those of layers alone
    ordered: bool = False  # the groups may be of inputs in the order of their activation (`desc_act`)
    mean_bytes: float = 0.0  # of a weight in memory, of a file of many types; 0: as the other fields say
    table_bytes: float = 0.0  # of a weight of the embedding and the output head in memory; 0: stored plain

    def groups_of(self, columns: int) -> int:
        """Return the groups of a row of so many inputs."""
        return -(-columns // self.group) if self.group else 1

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a weight in memory with its share of scales and zero points; those of whole rows are left out."""
        if self.mean_bytes:
            return self.mean_bytes
        if not self.group:
            return self.bits / 8
        scale = 4 if self.block_rows else 2  # FP8 blocks store float32
        return self.bits / 8 + (scale + self.has_zeros) / self.group
