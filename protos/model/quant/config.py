"""`quantization_config` of a `config.json` as a `QuantScheme`; what is not read is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from protos.model.json_fields import Fields
from protos.model.quant.scheme import Format, QuantScheme

KEY = "quantization_config"
SUPPORTED = (
    "supported are gptq (4 and 8 bits), awq (gemm, 4 bits), fp8 (e4m3) and compressed-tensors (pack-quantized, "
    "int-quantized, float-quantized, naive-quantized)"
)
_GROUP = 16  # inputs of a group are a multiple of it
_MAX_GROUP = 1 << 20


def quant_scheme(config: Fields) -> QuantScheme | None:
    """Return how the checkpoint of a `config.json` is quantised; None for a plain one.

    Activations are not quantised while computing, whatever the file says of them: the results are those of its weights.
    GPUs from 8.9 on are the exception: with FP8 weights they quantise activations as the official recipe does.

    Raises ModelConfigError: a method, or a setting of one, that is not read.
    """
    if config.get("compression_config"):
        value = config.get("compression_config")
        raise config.error("compression_config", value, f"only {KEY} is read: {SUPPORTED}")
    if not config.get(KEY):
        return None
    section = config.section(KEY, f"must be an object: {SUPPORTED}")
    method = section.get("quant_method")
    reader = _METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise section.missing("quant_method", SUPPORTED) if method is None else _no(section, "quant_method", SUPPORTED)
    return reader(section)


def _no(section: Fields, key: str, requirement: str) -> Exception:
    return section.error(key, section.get(key), requirement)


def _gptq(section: Fields) -> QuantScheme:
    form = section.get("checkpoint_format") or section.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        key = "checkpoint_format" if section.get("checkpoint_format") else "format"
        raise section.error(key, form, "must be gptq or gptq_v2; export the checkpoint in one of them")
    if section.boolean("is_marlin_format", default=False):
        raise section.error("is_marlin_format", True, "must be false; export the checkpoint in the format gptq")
    _refuse_overrides(section)
    bits = section.integer("bits", low=1, high=16)
    if bits not in (4, 8):
        raise section.error("bits", bits, "must be 4 or 8")
    return QuantScheme(
        "gptq", bits, group=_group(section, "group_size"), has_zeros=not section.boolean("sym", default=True),
        zero_offset=1 if form == "gptq" else 0, ordered=section.boolean("desc_act", default=False),
        head=section.boolean("lm_head", default=False),
    )  # fmt: skip


def _refuse_overrides(section: Fields) -> None:
    """Raise for rules that give some modules other settings; those that only leave modules out begin with `-:`."""
    rules = section.get("dynamic")
    if rules and (not isinstance(rules, dict) or any(not str(rule).startswith("-:") for rule in rules)):
        raise section.error("dynamic", rules, "modules with settings of their own are not read; only rules of `-:` are")


def _awq(section: Fields) -> QuantScheme:
    version = section.get("version") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise section.error("version", version, "must be gemm")
    bits = section.integer("bits" if section.get("bits") is not None else "w_bit", low=1, high=16)
    if bits != 4:
        raise section.error("bits", bits, "must be 4")
    if not section.boolean("zero_point", default=True):
        raise section.error("zero_point", False, "must be true")
    key = "group_size" if section.get("group_size") is not None else "q_group_size"
    return QuantScheme("awq", 4, group=_group(section, key), has_zeros=True)


def _fp8(section: Fields) -> QuantScheme:
    fmt = section.get("fmt")
    if fmt not in (None, "e4m3", "float8_e4m3fn"):
        raise section.error("fmt", fmt, "must be e4m3")
    if section.get("is_checkpoint_fp8_serialized") is False:
        raise section.error("is_checkpoint_fp8_serialized", False, "the weights are plain: remove the section")
    rows, columns = _block(section, "weight_block_size")
    return QuantScheme("fp8", 8, is_float=True, group=columns, block_rows=rows)


def _compressed_tensors(section: Fields) -> QuantScheme:
    status = section.get("quantization_status")
    if status not in (None, "compressed"):
        raise section.error("quantization_status", status, "must be compressed")
    _refuse_other_changes(section)
    groups = section.section("config_groups", "must be an object")
    if not groups.values:
        raise section.missing("config_groups", "must name what is quantised")
    found, targets = [], []
    for name in groups.values:
        group = groups.section(name, "must be an object")
        targets += _names(group, "targets")
        form = group.get("format") or section.get("format")
        found.append(_weights(group.section("weights", "must be an object"), section, form))
    if any(scheme != found[0] for scheme in found):
        raise section.error("config_groups", list(groups.values), "several schemes in one model are not read; only one")
    has_head = _is_among("lm_head", targets) or "Linear" in targets
    return replace(found[0], head=has_head and not _is_among("lm_head", _names(section, "ignore")))


def _names(section: Fields, key: str) -> list[str]:
    value = section.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise section.error(key, value, "must be a list of names of modules or classes, or of patterns (`re:...`)")
    return value


def _is_among(module: str, names: list[str]) -> bool:
    """Return whether a module is named, or matched by a pattern, as compressed-tensors does it."""
    try:
        return any(re.match(name[3:], module) if name.startswith("re:") else name == module for name in names)
    except re.error:
        return False  # what the files store decides in the end


def _refuse_other_changes(section: Fields) -> None:
    sparsity = section.section("sparsity_config", "must be an object").get("format")
    if sparsity not in (None, "dense"):
        raise section.error("sparsity_config", sparsity, "sparse weights are not read; must be dense")
    if section.section("transform_config", "must be an object").get("config_groups"):
        raise section.error("transform_config", section.get("transform_config"), "rotated weights are not read")


def _weights(weights: Fields, section: Fields, form: object) -> QuantScheme:
    """Return the scheme of the weights of one config group."""
    kind, bits = weights.get("type") or "int", weights.integer("num_bits", low=1, high=16)
    forms: dict[tuple[object, object, int], Format] = {
        ("pack-quantized", "int", 4): "pack-quantized",
        ("pack-quantized", "int", 8): "pack-quantized",
        ("int-quantized", "int", 8): "int-quantized",
        ("naive-quantized", "int", 8): "int-quantized",
        ("float-quantized", "float", 8): "float-quantized",
        ("naive-quantized", "float", 8): "float-quantized",
    }
    if (form, kind, bits) not in forms:
        raise section.error("format", f"{form}, type {kind}, num_bits {bits}", SUPPORTED)
    strategy, group, rows = weights.get("strategy"), 0, 0
    if strategy is None:
        strategy = "group" if weights.get("group_size") else "tensor"
    if strategy == "group":
        group = _group(weights, "group_size")
    elif strategy == "block":
        rows, group = _block(weights, "block_structure", needed=True)
    elif strategy not in ("channel", "tensor"):
        raise weights.error("strategy", strategy, "must be one of group, channel, tensor, block")
    order = weights.get("actorder")
    if order not in (None, False, True, "group", "weight", "static", "dynamic"):
        raise weights.error("actorder", order, "must be group, weight, or not be there")
    return QuantScheme(
        forms[form, kind, bits], bits, is_float=kind == "float", group=group, block_rows=rows,
        has_zeros=not weights.boolean("symmetric", default=True), ordered=order in (True, "group", "dynamic"),
    )  # fmt: skip


def _group(section: Fields, key: str) -> int:
    """Return the inputs of a group, 0 for -1: all."""
    group = section.integer(key, low=-1, high=_MAX_GROUP)
    if group == -1:
        return 0
    if group < 1 or group % _GROUP:
        raise section.error(key, group, f"must be -1 or a multiple of {_GROUP}")
    return group


def _block(section: Fields, key: str, needed: bool = False) -> tuple[int, int]:
    """Return rows and columns of the blocks that share a scale, zeros for none."""
    value = section.get(key)
    if value is None and not needed:
        return 0, 0
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(size) is int for size in value)
    if not isinstance(value, list) or not is_pair or not all(0 < size <= _MAX_GROUP for size in value):
        raise section.error(key, value, "must be two whole numbers: rows and columns")
    if value[1] % _GROUP:
        raise section.error(key, value, f"columns must be a multiple of {_GROUP}")
    return value[0], value[1]


def _gguf(section: Fields) -> QuantScheme:
    """Return the scheme that `protos.model.gguf.config` writes for a file of blocks."""
    return QuantScheme(
        "gguf", 8, mean_bytes=section.number("mean_bytes", above=0.0, at_most=4.0),
        table_bytes=section.number("table_bytes", above=0.0, at_most=4.0),
    )  # fmt: skip


_METHODS: dict[str, Callable[[Fields], QuantScheme]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gguf": _gguf,
}
