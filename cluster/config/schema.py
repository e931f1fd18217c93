"""The configuration as frozen pydantic models: one class a section, and beside each key the rule an error shows.

`config.section.rule_of` is that rule; `config.deployment` prints it whatever the way in which the value is wrong.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cluster.common.addresses import is_loopback
from cluster.common.units import BYTES_RULE, COUNT_RULE
from cluster.config.attention import DualChunk, RopeScaling, SparseSection
from cluster.config.section import (
    POSITIVE,
    Bytes,
    Count,
    FileName,
    Host,
    ModelPath,
    PathValue,
    PowerOfTwo,
    RayAddress,
    Section,
    accepts,
    broken_rule,
)
from protos.model.document_prompt import DEFAULT_DOCUMENT_PROMPT, is_document_prompt
from protos.model.folder import served_name

FILE_RULE = "must be the path of a file"
NAME_RULE = "must be text of 1 to 200 characters"
MAX_TTL_S = 10 * 366 * 86400.0
TTL_RULE = f"must be a number of seconds above 0 and at most {MAX_TTL_S:.0f} (ten years)"


class ModelSection(Section):
    """The checkpoint, and the length of its context."""

    path: ModelPath = Field(
        description="must be the path of a model folder or GGUF file, or the name of a model such as Qwen/Qwen3-0.6B"
    )
    served_model_name: str = Field(
        default=None, validate_default=True, min_length=1, max_length=200, description=NAME_RULE
    )
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_model_len: Count | None = Field(default=None, ge=1, description=COUNT_RULE)
    load_format: Literal["auto", "dummy"] = "auto"
    rope_scaling: RopeScaling | None = Field(
        default=None, description="must be a mapping such as {rope_type: yarn, factor: 4.0}"
    )
    config_file: FileName = Field(
        default="config.json", description="must be the name of a file in model.path, such as config_1m.json"
    )
    dual_chunk_attention: DualChunk | None = Field(
        default=None, description="must be false, or a mapping such as {chunk_size: 256K, local_size: 8K}"
    )
    allow_beyond_positions: bool = False
    sampling_defaults: Literal["generation_config", "greedy"] = "generation_config"
    document_prompt: Annotated[str, accepts(is_document_prompt)] = Field(
        default=DEFAULT_DOCUMENT_PROMPT, description="must contain {document} once and after it {question} once"
    )

    chat_template: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9._-]{1,200}$",
        description="must be the name of one of the model's chat templates, or of a .jinja file in model.path",
    )  # fmt: skip

    tool_parser: Literal["auto", "qwen3_json", "qwen3_xml", "none"] = "auto"

    @field_validator("served_model_name", mode="before")
    @classmethod
    def _default_name(cls, value: object, info: ValidationInfo) -> object:
        path = info.data.get("path")
        return value if value is not None else (served_name(path) if path else "") or "model"

    @field_validator("dual_chunk_attention", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return {"enabled": False} if value is False else value


class ClusterSection(Section):
    """Where the stage processes run and how the model is split over them."""

    address: RayAddress = Field(default="local", description="must be local, auto, or the host:port of a Ray head")
    pipeline_parallel_size: int = Field(default=1, ge=1)
    expert_parallel_size: int = Field(default=1, ge=1)
    stage_layers: list[int] | None = Field(default=None, description="must be a list of layer counts, by stage")
    device: Literal["cpu", "cuda"] = "cpu"
    cuda_graphs: bool = True
    threads_per_actor: int | None = Field(default=None, ge=1, le=1024)
    cpus_per_actor: float | None = Field(default=None, gt=0, le=1024)
    network_interface: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.:-]{1,15}$",
        description="must be the name of a network interface such as eth0",
    )
    inter_node_tls: bool = True
    load_timeout_s: float = Field(default=600.0, gt=0, le=86400)
    step_timeout_s: float = Field(default=3600.0, gt=0, le=86400)
    trace_steps: bool = False

    @property
    def num_actors(self) -> int:
        """Stage processes in all: stages x shards."""
        return self.pipeline_parallel_size * self.expert_parallel_size

    def threads(self, cores: int) -> int:
        """Return the threads of one actor when all actors share `cores` cores."""
        return self.threads_per_actor or max(1, cores // self.num_actors)

    def cpus(self, cores: int) -> float:
        """Return the Ray CPUs reserved for one actor when all actors share `cores` cores."""
        return self.cpus_per_actor or min(float(self.threads(cores)), cores / self.num_actors)


class PrefillSection(Section):
    """Limits of one step, and which prompts share computed prefixes."""

    max_num_batched_tokens: int = Field(default=2048, ge=1, le=1 << 24, description=f"{POSITIVE} and at most {1 << 24}")
    max_num_seqs: int = Field(default=16, ge=1, le=1 << 16, description=f"{POSITIVE} and at most {1 << 16}")
    dynamic_chunks: bool = True
    share_across_lengths: bool = False
    share_across_keys: bool = False


class KvCacheSection(Section):
    """Memory of one actor for keys and values: a size, or a fraction of what the weights leave.

    Without either it is half of that, or as much more as the longest context needs (`memory_budget.kv_budget`).
    """

    bytes: Bytes | None = Field(default=None, ge=1, description=BYTES_RULE)
    fraction: float | None = Field(default=None, gt=0, le=1)
    page_size: PowerOfTwo = Field(default=64, ge=1, le=1024, description="must be a power of two from 1 to 1024")
    dtype: Literal["auto", "int8", "fp8"] = "auto"

    @model_validator(mode="after")
    def _one_of_two(self) -> KvCacheSection:
        if self.bytes is not None and self.fraction is not None:
            raise broken_rule("fraction", "give either kv_cache.bytes or kv_cache.fraction, not both")
        return self


class KvStoreSection(Section):
    """Where computed KV is kept beyond the process that computed it, and how much of it."""

    enabled: bool = True
    path: PathValue | None = Field(default=None, description="must be the path of a directory; default: kv in data_dir")
    max_bytes: Bytes | None = Field(default=None, ge=1, description=BYTES_RULE)
    ttl_s: float = Field(default=7 * 86400.0, gt=0, le=MAX_TTL_S, description=TTL_RULE)
    block_tokens: PowerOfTwo = Field(default=512, ge=1, le=1 << 20, description="must be a power of two")
    preload: float = Field(default=0.8, ge=0, le=1, description="must be a share of the KV cache, 0 to 1")


class ServerSection(Section):
    """Where clients and Prometheus connect (port 0: no listener), and the limits of what clients may ask."""

    host: Host = Field(default="127.0.0.1", description="must be a host name or an IP address")
    port: int = Field(default=0, ge=0, le=65535, description="must be a whole number from 0 (no door) to 65535")
    metrics_port: int = Field(default=0, ge=0, le=65535, description="must be a whole number from 0 (none) to 65535")
    metrics_host: Host = Field(default="127.0.0.1", description="must be a host name or an IP address")
    http_port: int = Field(default=0, ge=0, le=65535, description="must be a whole number from 0 (none) to 65535")
    http_host: Host = Field(default="127.0.0.1", description="must be a host name or an IP address")
    http_max_tokens: Count = Field(default=32768, ge=1, le=1 << 30, description=f"{COUNT_RULE}, from 1 to {1 << 30}")
    http_reasoning_field: Literal["both", "reasoning", "reasoning_content"] = "both"
    max_queued_jobs: int = Field(default=256, ge=1, le=1 << 20, description=f"{POSITIVE} and at most {1 << 20}")
    max_document_bytes: Bytes = Field(
        default=64 << 20, ge=1, le=16 << 30, description=f"{BYTES_RULE}, from 1 byte to 16GiB"
    )
    max_documents_bytes: Bytes = Field(
        default=16 << 30, ge=1, le=1 << 50, description=f"{BYTES_RULE}, from 1 byte to 1024TiB"
    )
    result_ttl_s: float = Field(default=7 * 86400.0, gt=0, le=MAX_TTL_S, description=TTL_RULE)
    document_ttl_s: float = Field(default=7 * 86400.0, gt=0, le=MAX_TTL_S, description=TTL_RULE)
    drain_timeout_s: float = Field(default=30.0, ge=0, le=86400)
    max_streams: int = Field(default=128, ge=1, le=4096)
    max_batch_jobs: int = Field(default=4, ge=1, le=4096)

    @model_validator(mode="after")
    def _ports_differ(self) -> ServerSection:
        if self.metrics_port and self.metrics_port == self.port:
            raise broken_rule("metrics_port", "is server.port too; give each its own port")
        for other in ("port", "metrics_port"):
            if self.http_port and self.http_port == getattr(self, other):
                raise broken_rule("http_port", f"is server.{other} too; give each its own port")
        return self

    @model_validator(mode="after")
    def _one_document_fits(self) -> ServerSection:
        if self.max_documents_bytes < self.max_document_bytes:
            raise broken_rule("max_documents_bytes", "is below server.max_document_bytes; must have room for one")
        return self


class SecuritySection(Section):
    """API keys and TLS of the server, and the permission to do without them on a public address."""

    api_keys_file: PathValue | None = Field(default=None, description=FILE_RULE)
    tls_cert_file: PathValue | None = Field(default=None, description=FILE_RULE)
    tls_key_file: PathValue | None = Field(default=None, description=FILE_RULE)
    tls_client_ca_file: PathValue | None = Field(default=None, description=FILE_RULE)
    allow_insecure_bind: bool = False

    @model_validator(mode="after")
    def _tls_is_whole(self) -> SecuritySection:
        both = "security.tls_cert_file and security.tls_key_file"
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            missing = "tls_cert_file" if self.tls_cert_file is None else "tls_key_file"
            raise broken_rule(missing, f"{both} go together; give both or neither")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise broken_rule("tls_client_ca_file", f"needs TLS; give {both} too")
        return self


class Config(Section):
    """A whole YAML file. Validate with context `{"base_dir": Path}`, to which relative paths are resolved."""

    model: ModelSection = Field(description="must be a mapping with at least path")
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    prefill: PrefillSection = Field(default_factory=PrefillSection)
    sparse: SparseSection = Field(default_factory=SparseSection)
    kv_cache: KvCacheSection = Field(default_factory=KvCacheSection)
    kv_store: KvStoreSection = Field(default_factory=KvStoreSection)
    server: ServerSection = Field(default_factory=ServerSection)
    data_dir: PathValue = Field(
        default="~/.local/share/longreach", validate_default=True, description="must be the path of a directory"
    )
    security: SecuritySection = Field(default_factory=SecuritySection)

    @field_validator(
        "model", "cluster", "prefill", "sparse", "kv_cache", "kv_store", "server", "security", mode="before"
    )
    @classmethod
    def _empty_section(cls, value: object) -> object:
        return {} if value is None else value  # `server:` with nothing under it

    @model_validator(mode="after")
    def _fp8_needs_a_gpu(self) -> Config:
        if self.kv_cache.dtype == "fp8" and self.cluster.device == "cpu":
            raise broken_rule("kv_cache.dtype", "fp8 needs cluster.device: cuda; use int8, which takes as much memory")
        return self

    @model_validator(mode="after")
    def _public_bind_is_authenticated(self) -> Config:
        security = self.security
        guarded = security.api_keys_file is not None and security.tls_cert_file is not None
        for key in ("host", "http_host"):
            if not (is_loopback(getattr(self.server, key)) or guarded or security.allow_insecure_bind):
                raise broken_rule(
                    f"server.{key}",
                    "is not a loopback address; use 127.0.0.1, or give security.api_keys_file with tls_cert_file and "
                    "tls_key_file, or say security.allow_insecure_bind: true",
                )
        if not (is_loopback(self.server.metrics_host) or security.allow_insecure_bind):
            raise broken_rule(
                "server.metrics_host",
                "is not a loopback address, and metrics have neither keys nor TLS; use 127.0.0.1, or say "
                "security.allow_insecure_bind: true",
            )
        return self
