"""Compare sparse prefill, int8 KV and pinned length scales on one document; a process of `workers.eval` computes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.common.units import parse_count
from cluster.config.deployment import Deployment, load_deployment
from cluster.config.memory_budget import compute_dtype
from cluster.engine.attention_report import describe_sparsity
from cluster.hub.models import model_argument
from cluster.stages.preflight import check_head
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.display import Display
from cluster.tools.eval.haystack import read_source
from cluster.tools.eval.modes import Target, dual_chunk_overrides, load_mode, mode_overrides, set_aside, trained_window
from cluster.tools.torch_process import run_torch
from protos.errors import UserError
from protos.node.environment import usable_cores

MAX_LENGTH = 1 << 31  # tokens


@dataclass(frozen=True, slots=True)
class RecallOptions:
    """What is compared."""

    tokens: int = 65536  # of the document, from its beginning
    num_next: int = 64  # positions after them at which next tokens are compared
    positions: str = "auto"  # auto, plain, yarn, dca
    sparse: bool = True
    kv: str = "auto"
    sparse_threshold: int | None = 0
    document: Path | None = None
    pinned: tuple[str, ...] = ()  # lengths whose length scale is compared with the document's own: 1.25x, 256K, max
    against: tuple[Path, ...] = ()  # other checkpoints with the same tokens, such as quantised copies
    more: Mapping[str, object] = field(default_factory=dict)  # further dotted keys of the YAML

    def __post_init__(self) -> None:
        if not self.sparse and self.kv == "auto" and not self.pinned and not self.against:
            raise UserError("--no-sparse: leaves nothing to compare: add --kv int8, --pinned or --against")

    @property
    def variants(self) -> list[dict[str, Any]]:
        """What is compared with dense attention over KV in the computing type."""
        variants = [{"name": "sparse", "sparse": True, "kv": "auto"}] if self.sparse else []
        if self.kv != "auto":
            variants.append({"name": f"{self.kv} KV", "sparse": False, "kv": self.kv})
            if self.sparse:
                variants.append({"name": f"sparse, {self.kv} KV", "sparse": True, "kv": self.kv})
        return variants


def run_recall(target: Target, options: RecallOptions, display: Display) -> dict[str, Any]:
    """Read the document in every variant and return the report.

    Raises:
        UserError: the request cannot be carried out.
        ProcessFailed: the computing process died.
    """
    positions = _positions(target, options)
    more = dict(options.more)
    if options.sparse:
        more = {"sparse.enabled": True, "sparse.threshold": options.sparse_threshold} | more
        more = {key: value for key, value in more.items() if value is not None}
    deployment = load_mode(target, positions, options.tokens + options.num_next, more=more)
    if options.sparse and deployment.spec.sparse is None:
        raise UserError("--sparse: the configuration switches it off: leave sparse.enabled out of --set")
    for line in set_aside(target, positions, deployment):
        display.say(line)
    check_head(deployment)
    tokenizer = TextTokenizer.open(deployment.config.model.path, deployment.config.model.chat_template)
    prompt = _prompt(tokenizer, options)
    pinned = _pinned_lengths(target, deployment, positions, options)
    against = [model_argument("--against", model, on_progress=display.amount) for model in options.against]
    others = _others(target, deployment, positions, replace(options, against=tuple(against)))
    display.status("loading weights")
    result = run_torch("workers.eval", _request(deployment, options, prompt, pinned, others), display.tokens)
    result["reference"]["text"] = tokenizer.decode(result["reference"].pop("token_ids"))
    sparse = deployment.spec.sparse
    return {
        "what": "recall",
        "model": deployment.config.model.served_model_name,
        "text": "book" if options.document is None else options.document.name,
        "tokens": len(prompt),
        "next": options.num_next,
        "positions": positions,
        "dtype": compute_dtype(deployment),
        "sparse": None if sparse is None else {
            "description": describe_sparsity(deployment.spec), "threshold": sparse.threshold, "cell": sparse.cell,
        },
        **result,
    }  # fmt: skip


def _positions(target: Target, options: RecallOptions) -> str:
    if options.positions != "auto":
        return options.positions
    if dual_chunk_overrides(target, options.more) is not None:
        return "dca"
    return (
        "plain" if options.tokens + options.num_next <= trained_window(target.settings(options.more).path) else "yarn"
    )


def _prompt(tokenizer: TextTokenizer, options: RecallOptions) -> list[int]:
    """Return the first tokens of the document, as they are: no question, no chat template. Raises UserError."""
    text = read_source(needle_dir(), options.document).text
    ids = tokenizer.encode(text[: 8 * options.tokens], add_special=True, literal=True)  # mostly more than enough
    if len(ids) < options.tokens:
        ids = tokenizer.encode(text, add_special=True, literal=True)
    if len(ids) < options.tokens:
        raise UserError(f"--tokens: {options.tokens}: the document has {len(ids)} tokens: lower it to that")
    return ids[: options.tokens]


def _pinned_lengths(target: Target, deployment: Deployment, positions: str, options: RecallOptions) -> list[int]:
    """Return the lengths of `--pinned` in tokens, each once, the shortest first. Raises UserError."""
    dual = deployment.spec.dual_chunk
    if options.pinned and (dual is None or dual.original_max_position_embeddings <= 0):
        raise UserError("--pinned: these positions have no length scale: it belongs to dual chunk attention")
    lengths = set()
    for text in options.pinned:
        if text == "max":
            length = _longest(target, positions, options)
        elif re.fullmatch(r"\d+(\.\d+)?x", text):
            length = math.ceil(options.tokens * float(text[:-1]))
        else:
            try:
                length = parse_count(text)
            except ValueError as error:
                raise UserError(f"--pinned: {text!r}: must be a factor as 1.25x, a length as 256K, or max") from error
        if not options.tokens <= length <= MAX_LENGTH:
            raise UserError(f"--pinned: {text}: {length} tokens: must be {options.tokens} (--tokens) to {MAX_LENGTH}")
        lengths.add(length)
    return sorted(lengths)


def _longest(target: Target, positions: str, options: RecallOptions) -> int:
    """Return how long a document of the deployment may be: `model.max_model_len`, else what the positions cover."""
    overrides = target.overrides | mode_overrides(target, positions, options.tokens, None, options.more)
    given = target.settings(options.more).max_model_len
    return given or load_deployment(target.config, overrides | dict(options.more)).max_model_len


def _others(target: Target, deployment: Deployment, positions: str, options: RecallOptions) -> list[dict[str, Any]]:
    """Return name, folder and specification of the checkpoints of `--against`. Raises UserError."""
    others = []
    for path in options.against:
        other = load_mode(replace(target, model=path), positions, options.tokens + options.num_next, more=options.more)
        if other.spec.vocab_size != deployment.spec.vocab_size:
            raise UserError(
                f"--against: {path}: {other.spec.vocab_size} tokens in its vocabulary, the model has "
                f"{deployment.spec.vocab_size}: must be a checkpoint with the same tokens"
            )
        check_head(other)
        spec = json.loads(other.spec.to_json())
        others.append(
            {"name": other.config.model.served_model_name, "model": str(other.config.model.path), "spec": spec}
        )
    names = [other["name"] for other in others]
    if len(set(names)) < len(names):
        raise UserError(f"--against: {', '.join(names)}: names of folders must differ")
    return others


def _request(
    deployment: Deployment, options: RecallOptions, prompt: list[int], pinned: list[int], others: list[dict[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    config = deployment.config
    return {
        "model": str(config.model.path),
        "spec": json.loads(deployment.spec.to_json()),
        "dtype": compute_dtype(deployment),
        "device": config.cluster.device,
        "threads": usable_cores(),  # one process has all of them, whatever the actors of the YAML would get
        "chunk": config.prefill.max_num_batched_tokens,
        "page_size": config.kv_cache.page_size,
        "dummy": config.model.load_format == "dummy",
        "prompt": prompt,
        "next": options.num_next,
        "variants": options.variants,
        "pinned": pinned,
        "others": others,
    }
