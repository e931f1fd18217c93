from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Span(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class ShardSpec(_message.Message):
    __slots__ = ("stage", "num_stages", "rank", "num_ranks", "layers", "heads", "kv_heads", "experts", "intermediate", "vocab")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_FIELD_NUMBER: _ClassVar[int]
    stage: int
    num_stages: int
    rank: int
    num_ranks: int
    layers: Span
    heads: Span
    kv_heads: Span
    experts: Span
    intermediate: Span
    vocab: Span
    def __init__(self, stage: _Optional[int] = ..., num_stages: _Optional[int] = ..., rank: _Optional[int] = ..., num_ranks: _Optional[int] = ..., layers: _Optional[_Union[Span, _Mapping]] = ..., heads: _Optional[_Union[Span, _Mapping]] = ..., kv_heads: _Optional[_Union[Span, _Mapping]] = ..., experts: _Optional[_Union[Span, _Mapping]] = ..., intermediate: _Optional[_Union[Span, _Mapping]] = ..., vocab: _Optional[_Union[Span, _Mapping]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("model_path", "model_spec_json", "shard", "dtype", "device", "load_format", "store_path", "group_timeout_s", "largest_step", "max_model_len", "page_size", "kv_dtype", "sampled_rows", "context_token_bytes")
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    MODEL_SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FORMAT_FIELD_NUMBER: _ClassVar[int]
    STORE_PATH_FIELD_NUMBER: _ClassVar[int]
    GROUP_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    LARGEST_STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_ROWS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    model_path: str
    model_spec_json: str
    shard: ShardSpec
    dtype: str
    device: str
    load_format: str
    store_path: str
    group_timeout_s: float
    largest_step: int
    max_model_len: int
    page_size: int
    kv_dtype: str
    sampled_rows: int
    context_token_bytes: int
    def __init__(self, model_path: _Optional[str] = ..., model_spec_json: _Optional[str] = ..., shard: _Optional[_Union[ShardSpec, _Mapping]] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., load_format: _Optional[str] = ..., store_path: _Optional[str] = ..., group_timeout_s: _Optional[float] = ..., largest_step: _Optional[int] = ..., max_model_len: _Optional[int] = ..., page_size: _Optional[int] = ..., kv_dtype: _Optional[str] = ..., sampled_rows: _Optional[int] = ..., context_token_bytes: _Optional[int] = ...) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("loaded_bytes", "total_bytes", "ready", "anonymous_growth_bytes", "available_bytes", "error", "kernel_family", "gpu", "rehearsed_bytes")
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    ANONYMOUS_GROWTH_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FAMILY_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    REHEARSED_BYTES_FIELD_NUMBER: _ClassVar[int]
    loaded_bytes: int
    total_bytes: int
    ready: bool
    anonymous_growth_bytes: int
    available_bytes: int
    error: str
    kernel_family: str
    gpu: str
    rehearsed_bytes: int
    def __init__(self, loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., ready: _Optional[bool] = ..., anonymous_growth_bytes: _Optional[int] = ..., available_bytes: _Optional[int] = ..., error: _Optional[str] = ..., kernel_family: _Optional[str] = ..., gpu: _Optional[str] = ..., rehearsed_bytes: _Optional[int] = ...) -> None: ...

class StartRequest(_message.Message):
    __slots__ = ("num_pages", "page_size", "kv_dtype", "downstream", "downstream_socket", "upstream_socket", "kv_store_path", "epoch", "store_path", "kv_block_tokens", "trace", "upstream_group", "downstream_group", "graph_rows")
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    DOWNSTREAM_FIELD_NUMBER: _ClassVar[int]
    DOWNSTREAM_SOCKET_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_SOCKET_FIELD_NUMBER: _ClassVar[int]
    KV_STORE_PATH_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORE_PATH_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_GROUP_FIELD_NUMBER: _ClassVar[int]
    DOWNSTREAM_GROUP_FIELD_NUMBER: _ClassVar[int]
    GRAPH_ROWS_FIELD_NUMBER: _ClassVar[int]
    num_pages: int
    page_size: int
    kv_dtype: str
    downstream: str
    downstream_socket: str
    upstream_socket: str
    kv_store_path: str
    epoch: int
    store_path: str
    kv_block_tokens: int
    trace: bool
    upstream_group: str
    downstream_group: str
    graph_rows: int
    def __init__(self, num_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., kv_dtype: _Optional[str] = ..., downstream: _Optional[str] = ..., downstream_socket: _Optional[str] = ..., upstream_socket: _Optional[str] = ..., kv_store_path: _Optional[str] = ..., epoch: _Optional[int] = ..., store_path: _Optional[str] = ..., kv_block_tokens: _Optional[int] = ..., trace: _Optional[bool] = ..., upstream_group: _Optional[str] = ..., downstream_group: _Optional[str] = ..., graph_rows: _Optional[int] = ...) -> None: ...

class StartReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "logprobs", "presence_penalty", "frequency_penalty")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    logprobs: int
    presence_penalty: float
    frequency_penalty: float
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ...) -> None: ...

class TokenBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class SampleSpec(_message.Message):
    __slots__ = ("params", "token_index", "history", "mask", "outputs", "bias", "is_biased", "banned", "forced")
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_INDEX_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    IS_BIASED_FIELD_NUMBER: _ClassVar[int]
    BANNED_FIELD_NUMBER: _ClassVar[int]
    FORCED_FIELD_NUMBER: _ClassVar[int]
    params: SamplingParams
    token_index: int
    history: _containers.RepeatedScalarFieldContainer[int]
    mask: bytes
    outputs: _containers.RepeatedScalarFieldContainer[int]
    bias: _containers.RepeatedCompositeFieldContainer[TokenBias]
    is_biased: bool
    banned: _containers.RepeatedScalarFieldContainer[int]
    forced: int
    def __init__(self, params: _Optional[_Union[SamplingParams, _Mapping]] = ..., token_index: _Optional[int] = ..., history: _Optional[_Iterable[int]] = ..., mask: _Optional[bytes] = ..., outputs: _Optional[_Iterable[int]] = ..., bias: _Optional[_Iterable[_Union[TokenBias, _Mapping]]] = ..., is_biased: _Optional[bool] = ..., banned: _Optional[_Iterable[int]] = ..., forced: _Optional[int] = ...) -> None: ...

class SequenceSlice(_message.Message):
    __slots__ = ("sequence", "start", "length", "prompt_len", "token_ids", "new_pages", "num_pages", "sample", "scale_len", "targets", "top")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NEW_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    SCALE_LEN_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    start: int
    length: int
    prompt_len: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    new_pages: _containers.RepeatedScalarFieldContainer[int]
    num_pages: int
    sample: SampleSpec
    scale_len: int
    targets: _containers.RepeatedScalarFieldContainer[int]
    top: int
    def __init__(self, sequence: _Optional[int] = ..., start: _Optional[int] = ..., length: _Optional[int] = ..., prompt_len: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., new_pages: _Optional[_Iterable[int]] = ..., num_pages: _Optional[int] = ..., sample: _Optional[_Union[SampleSpec, _Mapping]] = ..., scale_len: _Optional[int] = ..., targets: _Optional[_Iterable[int]] = ..., top: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step", "slices", "released")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    step: int
    slices: _containers.RepeatedCompositeFieldContainer[SequenceSlice]
    released: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., slices: _Optional[_Iterable[_Union[SequenceSlice, _Mapping]]] = ..., released: _Optional[_Iterable[int]] = ...) -> None: ...

class StepPlans(_message.Message):
    __slots__ = ("plans",)
    PLANS_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[StepPlan]
    def __init__(self, plans: _Optional[_Iterable[_Union[StepPlan, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class SampledToken(_message.Message):
    __slots__ = ("sequence", "token_id", "logprob", "top")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, sequence: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class CellReport(_message.Message):
    __slots__ = ("sequence", "layer", "first_head", "start", "length", "density", "estimated_recall", "held_out_recall", "dense")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_RECALL_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_RECALL_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    layer: int
    first_head: int
    start: int
    length: int
    density: _containers.RepeatedScalarFieldContainer[float]
    estimated_recall: _containers.RepeatedScalarFieldContainer[float]
    held_out_recall: _containers.RepeatedScalarFieldContainer[float]
    dense: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, sequence: _Optional[int] = ..., layer: _Optional[int] = ..., first_head: _Optional[int] = ..., start: _Optional[int] = ..., length: _Optional[int] = ..., density: _Optional[_Iterable[float]] = ..., estimated_recall: _Optional[_Iterable[float]] = ..., held_out_recall: _Optional[_Iterable[float]] = ..., dense: _Optional[_Iterable[bool]] = ...) -> None: ...

class ExpertCounts(_message.Message):
    __slots__ = ("layer", "tokens")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class StepTrace(_message.Message):
    __slots__ = ("node", "began_us", "input_us", "ended_us", "sent_us", "sent_bytes", "reduce_us", "reduce_bytes", "experts")
    NODE_FIELD_NUMBER: _ClassVar[int]
    BEGAN_US_FIELD_NUMBER: _ClassVar[int]
    INPUT_US_FIELD_NUMBER: _ClassVar[int]
    ENDED_US_FIELD_NUMBER: _ClassVar[int]
    SENT_US_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    REDUCE_US_FIELD_NUMBER: _ClassVar[int]
    REDUCE_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    node: str
    began_us: int
    input_us: int
    ended_us: int
    sent_us: int
    sent_bytes: int
    reduce_us: int
    reduce_bytes: int
    experts: _containers.RepeatedCompositeFieldContainer[ExpertCounts]
    def __init__(self, node: _Optional[str] = ..., began_us: _Optional[int] = ..., input_us: _Optional[int] = ..., ended_us: _Optional[int] = ..., sent_us: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., reduce_us: _Optional[int] = ..., reduce_bytes: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[ExpertCounts, _Mapping]]] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step", "stage", "rank", "compute_us", "samples", "error", "cells", "estimate_us", "targets", "trace")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_US_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    step: int
    stage: int
    rank: int
    compute_us: int
    samples: _containers.RepeatedCompositeFieldContainer[SampledToken]
    error: str
    cells: _containers.RepeatedCompositeFieldContainer[CellReport]
    estimate_us: int
    targets: _containers.RepeatedCompositeFieldContainer[SampledToken]
    trace: StepTrace
    def __init__(self, step: _Optional[int] = ..., stage: _Optional[int] = ..., rank: _Optional[int] = ..., compute_us: _Optional[int] = ..., samples: _Optional[_Iterable[_Union[SampledToken, _Mapping]]] = ..., error: _Optional[str] = ..., cells: _Optional[_Iterable[_Union[CellReport, _Mapping]]] = ..., estimate_us: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[SampledToken, _Mapping]]] = ..., trace: _Optional[_Union[StepTrace, _Mapping]] = ...) -> None: ...

class StepResults(_message.Message):
    __slots__ = ("results", "epoch")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[StepResult]
    epoch: int
    def __init__(self, results: _Optional[_Iterable[_Union[StepResult, _Mapping]]] = ..., epoch: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ActivationsEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvBlock(_message.Message):
    __slots__ = ("key", "parent", "start", "token_ids", "pages")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent: bytes
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    pages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., pages: _Optional[_Iterable[int]] = ...) -> None: ...

class KvBlocks(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[KvBlock]
    def __init__(self, blocks: _Optional[_Iterable[_Union[KvBlock, _Mapping]]] = ...) -> None: ...

class KvKeys(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class KvCount(_message.Message):
    __slots__ = ("blocks", "damaged", "bytes", "problem")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    damaged: int
    bytes: int
    problem: str
    def __init__(self, blocks: _Optional[int] = ..., damaged: _Optional[int] = ..., bytes: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class KvStored(_message.Message):
    __slots__ = ("blocks", "bytes", "problem", "is_full")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    IS_FULL_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    problem: str
    is_full: bool
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., problem: _Optional[str] = ..., is_full: _Optional[bool] = ...) -> None: ...

class KvListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvEntry(_message.Message):
    __slots__ = ("key", "parent", "start", "bytes", "used")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent: bytes
    start: int
    bytes: int
    used: float
    def __init__(self, key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., start: _Optional[int] = ..., bytes: _Optional[int] = ..., used: _Optional[float] = ...) -> None: ...

class KvEntries(_message.Message):
    __slots__ = ("entries", "free_bytes", "node")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[KvEntry]
    free_bytes: int
    node: str
    def __init__(self, entries: _Optional[_Iterable[_Union[KvEntry, _Mapping]]] = ..., free_bytes: _Optional[int] = ..., node: _Optional[str] = ...) -> None: ...

class KvFile(_message.Message):
    __slots__ = ("key", "name", "data", "is_last")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    name: str
    data: bytes
    is_last: bool
    def __init__(self, key: _Optional[bytes] = ..., name: _Optional[str] = ..., data: _Optional[bytes] = ..., is_last: _Optional[bool] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CloseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("state", "layers_done", "steps_done", "resident_bytes", "error", "epoch", "late", "is_computing")
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_DONE_FIELD_NUMBER: _ClassVar[int]
    STEPS_DONE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    IS_COMPUTING_FIELD_NUMBER: _ClassVar[int]
    state: str
    layers_done: int
    steps_done: int
    resident_bytes: int
    error: str
    epoch: int
    late: int
    is_computing: bool
    def __init__(self, state: _Optional[str] = ..., layers_done: _Optional[int] = ..., steps_done: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., error: _Optional[str] = ..., epoch: _Optional[int] = ..., late: _Optional[int] = ..., is_computing: _Optional[bool] = ...) -> None: ...
