"""Command line of the benchmarks: kernels, quantized, prefill, decode, links, gpu, compile and others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from protos.node.environment import write_result
from workers.bench.builds.limits import CAPABILITIES, GENERATIONS
from workers.bench.gpu import command as gpu_command
from workers.bench.kernels import KernelSetup, run_kernels
from workers.bench.kv_files import measure_kv_files
from workers.bench.model import DTYPES, PAGE, OneProcess, benchmark_spec, run_model
from workers.bench.quantized import OUTPUTS, run_experts_of_a_token, run_quantized
from workers.bench.timing import Figure
from workers.kernels.build import kernel_family

_UNITS = {"k": 1000, "K": 1024, "m": 1_000_000, "M": 1024 * 1024}  # as in the YAML files
_DECODE_TOKENS = 96
_KEYS = [4096, 16384, 65536]


def length(text: str) -> int:
    """Parse a token count such as `4096`, `4k` (4,000) or `4K` (4,096)."""
    unit = _UNITS.get(text[-1:], 1)
    digits = text if unit == 1 else text[:-1]
    if not (digits.isascii() and digits.isdigit()) or not 1 <= int(digits) * unit <= 1 << 21:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a token count from 1 to 2M, such as 4096, 4k or 4K")
    return int(digits) * unit


def lengths(text: str) -> list[int]:
    """Parse token counts separated by commas."""
    return [length(part) for part in text.split(",")]


def count(text: str) -> int:
    """Parse a whole number from 1 to 4096."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 to 4096")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(
        prog="python -m workers.bench",
        description="Measure the data plane on this machine. Needs only torch (numpy for frames and sampler; "
        "safetensors for --model).",
        parents=[_common_options()],
    )
    root.set_defaults(device="cpu", dtype="bfloat16", threads=None, repeats=None, json=None, date=None, quick=False)
    verbs = root.add_subparsers(dest="verb", required=True, metavar="WHAT", parser_class=_VerbParser)
    kernels = verbs.add_parser(
        "kernels", help="attention, experts, norms, rotation, linear, all-reduce, frames, sampler"
    )
    kernels.add_argument("--keys", type=lengths, default=_KEYS, help="contexts of attention (default: 4K,16K,64K)")
    verbs.add_parser("quantized", help="products with int4, int8 and FP8 weights beside bfloat16")
    for verb, text in (
        ("prefill", "time to the first token, as tokens a second"),
        ("decode", "prefill, then time of every further token"),
        ("all", "kernels, prefill and decode"),
    ):
        _model_options(verbs.add_parser(verb, help=text), needed=False)
    rounds = verbs.add_parser(
        "rounds", help="for every line prefill or decode on standard input: seconds to the first token, or of a step"
    )
    _model_options(rounds, needed=True)
    rounds.add_argument(
        "--tokens", type=count, default=_DECODE_TOKENS, help=f"decode steps of a round (default: {_DECODE_TOKENS})"
    )
    files = verbs.add_parser("kv-files", help="MB/s of writing and reading stored KV, beside plain files")
    files.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure (default: temporary files)")
    files.add_argument("--blocks", type=count, default=64, help="files of 512 tokens, 4 MiB each (default: 64)")
    links = verbs.add_parser(
        "links", help="ms of hidden states between two processes: Unix socket, gRPC, gRPC with TLS, device to device"
    )
    links.add_argument("--hidden", type=length, default=2048, help="width of the hidden states (default: 2048)")
    links.add_argument("--chunk", type=length, default=4096, help="tokens of a chunk (default: 4K)")
    builds = verbs.add_parser(
        "compile", help="every kernel of Triton for GPUs that are not there: registers, shared memory, instructions"
    )
    builds.add_argument(
        "--sm", type=int, nargs="+", choices=tuple(GENERATIONS), default=CAPABILITIES,
        help="compute capabilities (default: %(default)s)",
    )  # fmt: skip
    builds.add_argument("--only", default="", metavar="TEXT", help="launches with TEXT in their name (default: all)")
    builds.add_argument(
        "--resume", action="store_true",
        help="keep the compute capabilities that --json FILE has, if it is of the same code and Triton",
    )  # fmt: skip
    gpu_command.add_options(
        verbs.add_parser("gpu", help="check and time everything on a GPU, in calls of some minutes; see docs/gpu.md")
    )
    make = verbs.add_parser("make-checkpoint", help="write a model with random weights (the built-in one: 1.5 GB)")
    make.add_argument("out", type=Path, metavar="OUT", help="new folder")
    make.add_argument("--layers", type=count, help="decoder layers of the built-in model (default: 8)")
    make.add_argument(
        "--shape", type=Path, metavar="DIR",
        help="folder with the config.json of another model; its weights are written as fast as the disk is",
    )  # fmt: skip
    make.add_argument("--bits", type=int, choices=(4, 8), help="of the weights of --shape (default: bfloat16)")
    make.add_argument("--group", type=count, help="inputs that share a scale, with --bits (default: 128)")
    return root


class _VerbParser(argparse.ArgumentParser):
    """Takes the common options too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(parents=[_common_options()], **options)


def _common_options() -> argparse.ArgumentParser:
    """Return the options that may stand before and after WHAT; those that are not given leave no trace."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: cpu)")
    common.add_argument("--threads", type=count, help="CPU threads (default: what torch chooses)")
    common.add_argument("--dtype", choices=tuple(DTYPES), help="type of weights and activations")
    common.add_argument(
        "--repeats", type=count, help="runs behind every median (default: 10 for kernels, 3 for models)"
    )
    common.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    common.add_argument("--date", help="date to put into the file (default: now, UTC)")
    common.add_argument("--quick", action="store_true", help="small sizes and few repeats: checks that everything runs")
    return common


def _model_options(verb: argparse.ArgumentParser, needed: bool) -> None:
    verb.add_argument(
        "--model", type=Path, metavar="DIR", required=needed,
        help="checkpoint folder" + ("" if needed else " (default: the built-in shape with random weights)"),
    )  # fmt: skip
    verb.add_argument("--lengths", type=lengths, default=[4096, 16384], help="prompt lengths (default: 4K,16K)")
    verb.add_argument("--chunk", type=length, default=4096, help="most tokens of a prefill step (default: 4K)")


def main(argv: list[str] | None = None) -> int:
    """Run a benchmark; returns the exit status (2: the request cannot be carried out)."""
    options = parser().parse_args(argv)
    try:
        if options.json and not options.json.parent.is_dir():
            raise ValueError(f"--json: {options.json}: its folder does not exist; create it first")
        if options.verb == "make-checkpoint":
            print(f"{options.out}: {_make_checkpoint(options) / 1e9:.2f} GB of weights")
        elif options.verb == "compile":
            return _compile(options)
        elif options.verb == "gpu":
            return gpu_command.run(options)
        else:
            _run(options)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda: torch finds no GPU here; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.verb == "rounds":
        size = options.lengths[0]
        process = OneProcess(options.model, dtype, device, size + options.tokens + PAGE, options.chunk)
        for seconds in process.rounds(sys.stdin, process.prompt(size), options.tokens):
            print(seconds, flush=True)
        return
    figures = []
    for figure in _figures(options, device, dtype):
        print(figure.line(), flush=True)
        figures.append(asdict(figure))
    if options.json:
        # only the names of folders are kept: their paths mean nothing on another machine
        config = {key: value.name if isinstance(value, Path) else value for key, value in vars(options).items()}
        facts = _facts(device) | ({"date": options.date} if options.date else {})
        write_result(options.json, {"what": options.verb, "config": config, "figures": figures}, **facts)


def _make_checkpoint(options: argparse.Namespace) -> int:
    from workers.bench.checkpoint import write_checkpoint, write_shape  # need safetensors

    if options.bits is None and options.group is not None:
        raise ValueError("--group: needs --bits 4 or 8: weights in bfloat16 have no scales")
    if options.shape is None:
        if options.bits is not None:
            raise ValueError("--bits: needs --shape DIR: the built-in model is in bfloat16")
        return write_checkpoint(options.out, layers=options.layers or 8)
    if options.layers is not None:
        raise ValueError("--layers: is for the built-in model: the layers of --shape are those of its config.json")
    from workers.quant.rewrite import Recipe

    recipe = None if options.bits is None else Recipe(options.bits, options.group or 128)

    def show(done: int, total: int) -> None:
        if done == total or done % 1000 == 0:
            print(f"{done:,} of {total:,} tensors", file=sys.stderr, flush=True)

    return write_shape(options.out, options.shape, recipe, on_progress=show)


def _compile(options: argparse.Namespace) -> int:
    """Compile all kernels, and write the file after each generation; returns 1 if some take more than their limits."""
    import triton

    from workers.bench.builds import table

    if options.resume and not options.json:
        raise ValueError("--resume: needs --json FILE, whose rows are kept")
    rows = table.rows_of(options.json, triton.__version__) if options.resume else []
    there = {row["sm"] for row in rows}
    for capability in (one for one in options.sm if one not in there):
        for row in table.compile_all((capability,), options.only):
            print(table.line(row), flush=True)
            rows.append(row)
        if options.json:
            facts = {"torch": torch.__version__} | ({"date": options.date} if options.date else {})
            table.write(options.json, rows, triton.__version__, **facts)
    beyond = sum(bool(row["violations"]) for row in rows)
    print(f"{len(rows)} builds, {beyond} beyond their limits")
    return 1 if beyond else 0


def _figures(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[Figure]:
    verb, quick = options.verb, options.quick
    if verb in ("kernels", "all"):
        keys = [256] if quick else options.keys if verb == "kernels" else _KEYS
        repeats = options.repeats or (2 if quick else 10)
        yield from run_kernels(KernelSetup(device, dtype, 64 if quick else 2048, tuple(keys), repeats))
    if verb == "quantized":
        repeats = options.repeats or (2 if quick else 10)
        yield from run_quantized(64 if quick else 1024, repeats, 64 if quick else OUTPUTS)
        yield from run_experts_of_a_token(repeats, *((16, 1) if quick else ()))
    if verb in ("prefill", "decode", "all"):
        sizes = [min(options.lengths[0], 300)] if quick else options.lengths
        decode = 0 if verb == "prefill" else 2 if quick else _DECODE_TOKENS
        model = options.model or benchmark_spec(1 if quick else 8)
        yield from run_model(model, dtype, device, sizes, options.chunk, decode, options.repeats or (1 if quick else 3))
    if verb == "kv-files":
        blocks, repeats = (2, 2) if quick else (options.blocks, options.repeats or 5)
        yield from measure_kv_files(options.folder, blocks, dtype, repeats)
    if verb == "links":
        from workers.bench.links import LinkSetup, measure_links  # needs gRPC, which a bare machine lacks

        repeats, chunk = (2, 64) if quick else (options.repeats or 20, options.chunk)
        yield from measure_links(LinkSetup(options.hidden, chunk, dtype, repeats, device.type))


def _facts(device: torch.device) -> dict[str, object]:
    """Return the facts of the environment that torch knows."""
    facts: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device.type}
    facts["kernels"] = kernel_family(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name, "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
        }  # fmt: skip
    return facts


if __name__ == "__main__":
    sys.exit(main())
