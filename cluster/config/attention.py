"""Sections of positions and attention: what the YAML file replaces of the model's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cluster.common.units import COUNT_RULE
from cluster.config.section import FLAG, POSITIVE, Count, Section, broken_rule, optional
from protos.model.spec import DUAL_CHUNK_SETTINGS, SPARSE_SETTINGS

_DUAL_CHUNK, _SPARSE = DUAL_CHUNK_SETTINGS, SPARSE_SETTINGS  # by name: Field
_SHARE = "must be a number from 0 to 1"


class RopeScaling(Section):
    """An override of the `rope_scaling` of config.json, with its keys."""

    rope_type: Literal["default", "yarn", "linear", "llama3"] = Field(
        description="must be one of default, yarn, linear, llama3"
    )
    factor: float | None = Field(default=None, ge=1, le=1e6, description="must be a number from 1 to 1000000")
    original_max_position_embeddings: Count | None = Field(default=None, ge=1, description=COUNT_RULE)
    beta_fast: float | None = Field(default=None, gt=0, description="must be a number above 0")
    beta_slow: float | None = Field(default=None, gt=0, description="must be a number above 0")
    attention_factor: float | None = Field(default=None, gt=0, description="must be a number above 0")
    mscale: float | None = Field(default=None, ge=0, description="must be a number of at least 0")
    mscale_all_dim: float | None = Field(default=None, ge=0, description="must be a number of at least 0")
    truncate: bool | None = Field(default=None, description=FLAG)
    low_freq_factor: float | None = Field(default=None, gt=0, description="must be a number above 0")
    high_freq_factor: float | None = Field(default=None, gt=0, description="must be a number above 0")

    @model_validator(mode="after")
    def _factor_is_given(self) -> RopeScaling:
        if self.rope_type != "default" and self.factor is None:
            raise broken_rule("factor", f"required with rope_type {self.rope_type}; it is never inferred")
        return self


def _no_number(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):  # 1 would pass for true
        raise ValueError("a number")
    return value


class DualChunk(Section):
    """Dual chunk attention; what is null comes from the model's file. `false` stands for `{enabled: false}`."""

    enabled: bool | None = Field(default=None, description=FLAG)
    chunk_size: Count | None = optional(_DUAL_CHUNK["chunk_size"], f"{COUNT_RULE}, at least 2")
    local_size: Count | None = optional(_DUAL_CHUNK["local_size"], COUNT_RULE)
    original_max_position_embeddings: Count | None = optional(
        _DUAL_CHUNK["original_max_position_embeddings"], COUNT_RULE
    )

    @model_validator(mode="after")
    def _local_is_smaller(self) -> DualChunk:
        if self.chunk_size is not None and self.local_size is not None and self.local_size >= self.chunk_size:
            raise broken_rule("local_size", f"must be below chunk_size ({self.chunk_size})")
        return self


class SparseSection(Section):
    """Sparse prefill of long prompts; what is null comes from the model's file."""

    enabled: Annotated[Literal["auto", True, False], BeforeValidator(_no_number)] = Field(
        default="auto", description="must be one of auto, true, false"
    )
    threshold: Count | None = optional(_SPARSE["threshold"], COUNT_RULE)
    last_q: int | None = optional(_SPARSE["last_q"], "must be a whole number from 1 to 1024")
    cell: Count | None = optional(_SPARSE["cell"], f"{COUNT_RULE}, at most 1M")
    n_vertical: Count | None = optional(_SPARSE["n_vertical"], POSITIVE)
    n_slash: Count | None = optional(_SPARSE["n_slash"], POSITIVE)
    target_recall: float | None = optional(_SPARSE["target_recall"], "must be a number above 0 and at most 1")
    recall_floor: float | None = optional(_SPARSE["recall_floor"], f"{_SHARE} (0: off)")
    max_dense_share: float | None = optional(_SPARSE["max_dense_share"], _SHARE)
    synthetic: bool = Field(default=False, description=FLAG)

    @model_validator(mode="after")
    def _budgets_agree(self) -> SparseSection:
        if (self.n_vertical is None) != (self.n_slash is None):
            missing = "n_vertical" if self.n_vertical is None else "n_slash"
            raise broken_rule(missing, "sparse.n_vertical and sparse.n_slash go together; give both or neither")
        if self.n_vertical is not None and self.target_recall is not None:
            raise broken_rule("target_recall", "give either a recall or n_vertical with n_slash, not both")
        return self

    def as_mapping(self) -> Mapping[str, Any]:
        """Return the keys that are not null; `enabled: auto` is left out."""
        return {key: value for key, value in super().as_mapping().items() if (key, value) != ("enabled", "auto")}
