"""Rules of the structure: import directions, what a running head may load, file lengths, CLI verbs, generated code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from cluster.bench.speed.head import Layout, load_measured
from cluster.bench.speed.settings import load_bench
from cluster.cli.main import main
from cluster.config.deployment import Config, load_config
from tests.support.paths import CONFIGS, HARDWARE

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "cluster": {"torch", "workers", "transformers", "safetensors.torch", "tests"},
    "workers": {"cluster", "tests"},
    "protos": {"torch", "cluster", "workers", "ray", "transformers", "tests"},
}
ALLOWED = {("cluster/stages/launcher.py", "workers")}  # the bridge, imported inside functions
VERBS = {
    "run", "doctor", "demo", "serve", "up", "down",
    "submit", "wait", "stream", "jobs", "cancel", "docs", "tokens", "status", "eval", "keys", "plan", "quantize",
    "bench",
}  # fmt: skip
MAX_LINES = 400
MAX_FILES = 12
# lowest first: a package imports only from packages before it, and from itself
LAYERS = {
    "protos": ["errors", "generate", "jobs", "model", "stage", "node"],
    "cluster": [
        "common", "hub", "config", "text", "constraints", "scheduler", "latency", "stages", "kv_store", "engine",
        "jobs", "client", "access", "http", "server", "tools", "planner", "bench", "cli",
    ],
    "workers": [
        "kernels", "quant", "kv", "attention", "sparse", "transport", "model", "runner", "stage", "eval", "bench",
        "training", "doctor",
    ],
}  # fmt: skip
NEVER = {
    "client": {"config", "text", "scheduler", "stages", "kv_store", "engine", "jobs"},
    "scheduler": {"config", "text", "stages"},
}
TESTED_ELSEWHERE = {  # a module or a whole package: where its tests are
    "protos/errors.py": "one class without code; tests/unit/cluster/client/test_errors.py",
    "protos/generate.py": "test_generated_code_is_current, below",
    "protos/jobs/limits.py": "constants; tests/unit/protos/jobs/test_validate.py",
    "cluster/bench": "measurements of a running cluster, run by hand; what they compute is in test_rig",
    "cluster/stages/handle.py": "tests/integration/stages/test_stage_process.py: needs the other process",
    "cluster/stages/ray_owner.py": "tests/integration/stages/test_local_ray.py: a process of its own",
    "workers/bench": "tests/unit/workers/bench/test_main.py; transformers_peer in tests/integration/cli/test_bench.py",
    "workers/eval/__main__.py": "tests/integration/cli/test_eval.py",
    "workers/model/sparse_prefill.py": "tests/identity/test_sparse_prefill.py",
    "workers/stage/actor.py": "tests/integration/cli/test_run.py: needs Ray",
    "workers/stage/server.py": "tests/integration/stages/test_stage_process.py: a process of its own",
}
OTHER_YAML = {
    HARDWARE.name,
    "compose.yaml",
    "raycluster.yaml",
    "podmonitor.yaml",
}  # of other programs: tests/test_deploy.py
CLUSTERS = sorted(
    path for path in CONFIGS.glob("**/*.yaml") if path.name not in OTHER_YAML and path.parent != CONFIGS / "bench"
)
SOURCES = sorted(p for d in ("cluster", "workers", "protos", "tests") for p in (ROOT / d).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at module level) of every import; imports for type checkers do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module, id(node) in top))
            if "." not in node.module:  # `from cluster import client` names a package
                found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def folders_between(top: str) -> list[tuple[str, str, str]]:
    """(file, its package, imported package) of every import inside `top`; lazy imports count."""
    found = []
    for path in sorted((ROOT / top).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        own = path.relative_to(ROOT / top).parts[0].removesuffix(".py")
        for module, _ in imports(path):
            parts = module.split(".")
            if parts[0] == top and len(parts) > 1 and own != "__init__":
                found.append((name, own, parts[1]))
    return found


@pytest.mark.parametrize("top", LAYERS)
def test_packages_form_layers(top: str) -> None:
    order = LAYERS[top]
    assert {p.stem for p in (ROOT / top).iterdir() if not p.name.startswith((".", "__"))} - {"py"} == set(order)
    upward = [
        f"{name} imports {top}.{package}"
        for name, own, package in folders_between(top)
        if order.index(package) > order.index(own) or package in NEVER.get(own, ())
    ]
    assert not upward


def test_folders_are_small() -> None:
    """At most MAX_FILES a folder, but for the data that ships with the package and dated results."""
    folders = {path.parent for d in ("cluster", "workers", "protos", "tests") for path in (ROOT / d).rglob("*.*")}
    sizes = {
        folder.relative_to(ROOT).as_posix(): len([f for f in folder.iterdir() if f.is_file() and f.stem != "__init__"])
        for folder in folders
        if "__pycache__" not in folder.parts
    }
    assert {name: size for name, size in sizes.items() if size > MAX_FILES} == {}


def has_test(module: Path) -> bool:
    """Whether a test file has the module's name, at the mirrored place or in a folder of tests/integration."""
    name = f"test_{module.stem.strip('_')}.py"
    at = [ROOT / "tests" / "unit" / module.parent / name]
    if "__main__" not in module.name:
        at += (ROOT / "tests" / "integration").glob(f"*/{name}")
    return any(path.is_file() for path in at)


def test_every_module_has_a_test() -> None:
    modules = {
        path.relative_to(ROOT)
        for top in ("cluster", "workers", "protos")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py" and "_pb2" not in path.name
    }
    untested = {module for module in modules if not has_test(module)}
    listed = {name: {module for module in untested if module.is_relative_to(name)} for name in TESTED_ELSEWHERE}
    assert sorted(map(str, untested - set().union(*listed.values()))) == []
    assert [name for name, missing in listed.items() if not missing] == [], "has a test by now: leave the list"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    crossings = []
    for path in (ROOT / package).rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        for module, at_top in imports(path):
            hit = {module, module.split(".")[0]} & FORBIDDEN[package]
            if hit and not ((name, module.split(".")[0]) in ALLOWED and not at_top):
                crossings.append(f"{name} imports {module}")
    assert not crossings


def test_stage_actor_imports_torch_late() -> None:
    code = "import sys; import workers.stage.actor, workers.stage.server; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


def test_client_is_light() -> None:
    code = "import sys; from cluster import Client; print([m for m in ('ray', 'torch', 'grpc') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_only_the_package_http_needs_its_extra() -> None:
    needed = {"fastapi", "starlette", "uvicorn", "python_multipart"}
    found = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cluster").rglob("*.py")
        if {module.split(".")[0] for module, _ in imports(path)} & needed
    ]
    assert [name for name in found if not name.startswith("cluster/http/")] == []
    code = f"import sys, cluster.server.head; print(sorted({needed} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


SERVING = {
    "head": ["cluster.cli.main", "cluster.cli.head", "cluster.server.head"],
    "stage": ["workers.stage.actor", "workers.stage.server", "workers.stage.worker"],
}
NOT_SERVING = re.compile(r"(cluster|workers)\.(bench|training|eval)\b|cluster\.tools\.eval\b")


@pytest.mark.parametrize("process", SERVING)
def test_serving_loads_no_benchmarks_and_no_training(process: str) -> None:
    code = f"import sys, importlib; [importlib.import_module(m) for m in {SERVING[process]!r}]; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert set(SERVING[process]) <= set(loaded)
    assert [module for module in loaded if NOT_SERVING.match(module)] == []


@pytest.mark.parametrize("start", ["cluster.server.head", "workers.stage.server"])
def test_serving_reaches_no_benchmarks_and_no_training(start: str) -> None:
    """Nothing that serving imports, now or later inside a function, leads there."""
    reached, left = {start}, [start]
    while left:
        path = ROOT / (left.pop().replace(".", "/") + ".py")
        named = {module for module, _ in imports(path)} if path.exists() else set()
        found = {module for module in named if module.split(".")[0] in FORBIDDEN} - reached
        reached |= found
        left += found
    assert {"protos.stage.messages", "workers.runner.model_runner"} <= reached
    assert [module for module in reached if NOT_SERVING.match(module)] == []


def test_training_is_not_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"] == ["workers/training"]


def test_every_head_module_loads_without_torch() -> None:
    files = [
        p.relative_to(ROOT).with_suffix("") for p in (ROOT / "cluster").rglob("*.py") if not p.stem.startswith("__")
    ]
    modules = [".".join(path.parts) for path in files]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.name)
def test_every_config_loads(path: Path) -> None:
    assert load_config(path).model.served_model_name


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "bench").glob("**/*.yaml")), ids=lambda p: p.name)
def test_every_benchmark_loads_with_its_deployments(path: Path) -> None:
    bench = load_bench(path)
    for mode in bench.settings.modes:
        for layout in bench.settings.layouts:
            deployment = load_measured(bench, mode, Layout(*layout), 1024, {"model.max_model_len": 1024})
            assert len(deployment.shards) == layout[0] * layout[1]


def test_demo_config_explains_every_key() -> None:
    text = (ROOT / "configs" / "demo.yaml").read_text()

    def names(model: type[BaseModel]) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            found.append(name)
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    found += names(kind)
        return found

    assert [name for name in names(Config) if not re.search(rf"\b{name}\b", text)] == []


def test_cli_verbs_are_frozen() -> None:
    assert set(main.commands) == VERBS
    for verb in main.commands.values():
        assert verb.help, f"{verb.name} has no help"
        for option in verb.params:
            assert isinstance(option, click.Argument) or option.help, f"{verb.name} {option.name} has no help"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_are_short(path: Path) -> None:
    if "_pb2" not in path.name:
        assert len(path.read_text().splitlines()) <= MAX_LINES


def test_generated_code_is_current(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools comes with the test extra")
    from protos.generate import generate

    for fresh in generate(tmp_path):
        current = (ROOT / "protos" / fresh.relative_to(tmp_path)).read_text()
        assert fresh.read_text() == current, f"{fresh.name} is old: run python -m protos.generate"


def test_no_pickle_on_our_wires() -> None:
    for path in SOURCES:
        if path.parent.name != "training":  # its state files stay on one machine
            named = {module.split(".")[0] for module, _ in imports(path)}
            assert not named & {"pickle", "cloudpickle", "dill"}, path


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name
)
def test_links_of_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text())
    assert [t for t in targets if "://" not in t and not (path.parent / t).exists()] == []
