"""Loading a quantised checkpoint takes the memory of what is stored: codes are never unpacked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from protos.model.checkpoint import expected_tensors
from protos.model.quant.parts import parts_of
from protos.model.quant.scheme import QuantScheme
from protos.model.spec import ModelSpec
from tests.support.paths import ROOT
from tests.unit.workers.model.test_weights import MOE

SCHEMES = {
    "gptq": QuantScheme("gptq", 4, group=128, zero_offset=1),
    "gptq8": QuantScheme("gptq", 8, group=128, zero_offset=1, has_zeros=True),
    "awq": QuantScheme("awq", 4, group=128, has_zeros=True),
    "packed": QuantScheme("pack-quantized", 4, group=128),
    "fp8": QuantScheme("fp8", 8, is_float=True, group=128, block_rows=128),
}
# 375 million weights in experts and attention: 190 MB at 4 bits
BIG = replace(
    MOE, vocab_size=512, hidden_size=2048, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
    head_dim=128, intermediate_size=1024, num_experts=24, moe_intermediate_size=768, dtype="bfloat16",
)  # fmt: skip
TINY = replace(BIG, vocab_size=16, num_hidden_layers=2, num_experts=2)
DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "I64": torch.int64}
DTYPES["F8_E4M3"] = torch.float8_e4m3fn

MEASURE = """
import sys, threading, time
from dataclasses import replace
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import torch
from tests.integration.stages.test_quantized_memory import BIG, SCHEMES, TINY
from workers.model.weights import load_shard, whole_model

def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

folder, scheme = Path(sys.argv[2]), SCHEMES[sys.argv[3]]
tiny, big = replace(TINY, quant=scheme), replace(BIG, quant=scheme)
load_shard(folder / "tiny", tiny, whole_model(tiny), torch.bfloat16, "cpu")  # libraries are loaded by now
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
weights = load_shard(folder / "big", big, whole_model(big), torch.bfloat16, "cpu")
done.set()
thread.join()
print(max(peak, anonymous()) - before, weights.num_bytes)
"""


def write(folder: Path, spec: ModelSpec, scheme: QuantScheme) -> int:
    """Write a checkpoint of zeros; returns the bytes of its weights, scales and zero points."""
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in expected_tensors(spec).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
            continue
        for part in parts_of(scheme, *shape):
            if part.optional:
                continue
            dtype = torch.bfloat16 if "BF16" in part.dtypes and scheme.is_float else DTYPES[part.dtypes[0]]
            tensor = torch.zeros(part.shapes[0], dtype=dtype)
            if part.name == "qzeros":
                tensor += 0x77777777 if scheme.bits == 4 else 0x7F7F7F7F
            tensors[name.removesuffix("weight") + part.name] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("form", SCHEMES)
def test_memory_of_loading(form: str, tmp_path: Path) -> None:
    write(tmp_path / "tiny", TINY, SCHEMES[form])
    stored = write(tmp_path / "big", BIG, SCHEMES[form])
    command = [sys.executable, "-c", MEASURE, str(ROOT), str(tmp_path), form]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, own = map(int, done.stdout.split())
    print(f"{form}: {stored / 1e6:.1f} MB stored, {own / stored:.4f} held, {growth / stored:.4f} at the peak")
    assert stored > 100e6
    assert own * 0.95 < growth < stored * 1.02
