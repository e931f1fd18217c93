"""Sections of positions and attention: what the YAML file replaces of the model's own settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from cluster.common.units import COUNT_RULE
from cluster.config.section import POSITIVE, Count, Section, accepts, broken_rule
from protos.model.json_fields import MAX_POSITIONS, MAX_SIZE

_NO_NUMBER = accepts(lambda value: type(value) is not int, BeforeValidator)  # 1 would pass for true


class RopeScaling(Section):
    """An override of the `rope_scaling` of config.json, with its keys."""

    rope_type: Literal["default", "yarn", "linear", "llama3"]
    factor: float | None = Field(default=None, ge=1, le=1_000_000)
    original_max_position_embeddings: Count | None = Field(default=None, ge=1, description=COUNT_RULE)
    beta_fast: float | None = Field(default=None, gt=0)
    beta_slow: float | None = Field(default=None, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)
    mscale: float | None = Field(default=None, ge=0)
    mscale_all_dim: float | None = Field(default=None, ge=0)
    truncate: bool | None = None
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _factor_is_given(self) -> RopeScaling:
        if self.rope_type != "default" and self.factor is None:
            raise broken_rule("factor", f"required with rope_type {self.rope_type}; it is never inferred")
        return self


class DualChunk(Section):
    """Dual chunk attention; what is null comes from the model's file. `false` stands for `{enabled: false}`."""

    enabled: bool | None = None
    chunk_size: Count | None = Field(default=None, ge=2, le=MAX_POSITIONS, description=f"{COUNT_RULE}, at least 2")
    local_size: Count | None = Field(default=None, ge=1, le=MAX_POSITIONS, description=COUNT_RULE)
    original_max_position_embeddings: Count | None = Field(default=None, le=MAX_POSITIONS, description=COUNT_RULE)

    @model_validator(mode="after")
    def _local_is_smaller(self) -> DualChunk:
        if self.chunk_size is not None and self.local_size is not None and self.local_size >= self.chunk_size:
            raise broken_rule("local_size", f"must be below chunk_size ({self.chunk_size})")
        return self


class SparseSection(Section):
    """Sparse prefill of long prompts; what is null comes from the model's file."""

    enabled: Annotated[Literal["auto", True, False], _NO_NUMBER] = "auto"
    threshold: Count | None = Field(default=None, le=MAX_POSITIONS, description=COUNT_RULE)
    last_q: int | None = Field(default=None, ge=1, le=1024)
    cell: Count | None = Field(default=None, ge=1, le=1 << 20, description=f"{COUNT_RULE}, at most 1M")
    n_vertical: Count | None = Field(default=None, ge=1, le=MAX_SIZE, description=POSITIVE)
    n_slash: Count | None = Field(default=None, ge=1, le=MAX_SIZE, description=POSITIVE)
    target_recall: float | None = Field(default=None, gt=0, le=1)
    recall_floor: float | None = Field(default=None, ge=0, le=1, description="must be a number from 0 to 1 (0: off)")
    max_dense_share: float | None = Field(default=None, ge=0, le=1)
    synthetic: bool = False

    @model_validator(mode="after")
    def _budgets_agree(self) -> SparseSection:
        if (self.n_vertical is None) != (self.n_slash is None):
            missing = "n_vertical" if self.n_vertical is None else "n_slash"
            raise broken_rule(missing, "sparse.n_vertical and sparse.n_slash go together; give both or neither")
        if self.n_vertical is not None and self.target_recall is not None:
            raise broken_rule("target_recall", "give either a recall or n_vertical with n_slash, not both")
        return self
