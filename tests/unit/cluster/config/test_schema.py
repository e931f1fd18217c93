"""Configuration: what is accepted, and that everything else is one line with file, line, key, value and rule."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.config.deployment import Config, ConfigError, load_config, load_deployment
from tests.support.paths import CONFIGS, HARDWARE

# Each line of BASE is replaced or extended by a case, so that line numbers in the expectations are real.
BASE = """\
model:
  path: needle
  max_model_len: 4k
cluster:
  pipeline_parallel_size: 2
kv_cache:
  page_size: 64
"""


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return path


def message_of(path: Path, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message.replace(str(path.parent) + "/", "")


# Text of the file -> the message: exact, or a pattern when it starts with ^.
MODEL_RULE = "must be the path of a model folder or GGUF file, or the name of a model such as Qwen/Qwen3-0.6B"
BAD = [
    ("", "demo.yaml:1: empty file: must be a mapping with at least model.path"),
    ("# nothing\n\n", "demo.yaml:1: empty file: must be a mapping with at least model.path"),
    ("~\n", 'demo.yaml:1: "~": the file must be a mapping with at least model.path'),
    ("\n- a\n", "demo.yaml:2: a list: the file must be a mapping with at least model.path"),
    ("hello", "demo.yaml:1: hello: the file must be a mapping with at least model.path"),
    ("cluster: {}\n", "demo.yaml:1: model: (missing): required; must be a mapping with at least path"),
    ("model:\n", f"demo.yaml:1: model.path: (missing): required; {MODEL_RULE}"),
    ("model: needle\n", "demo.yaml:1: model: needle: must be a mapping with at least path"),
    ("model: [needle]\n", "demo.yaml:1: model: (a list of 1): must be a mapping with at least path"),
    ("model: {path: ''}\n", f'demo.yaml:1: model.path: "": {MODEL_RULE}'),
    ("model: {path: ~nosuchuser/x}\n", "^demo.yaml:1: model.path: ~nosuchuser/x: must be the path"),
    ('model: {path: "a\\0b"}\n', r"^demo.yaml:1: model.path: a\\x00b: must be the path"),
    ("model: {path: 7}\n", "^demo.yaml:1: model.path: 7: must be the path"),
    (BASE + "  pagesize: 1\n", "demo.yaml:8: kv_cache.pagesize: 1: unknown key; did you mean 'page_size'?"),
    (BASE.replace("max_model_len", "max_modellen"),
     "demo.yaml:3: model.max_modellen: 4k: unknown key; did you mean 'max_model_len'?"),
    (BASE.replace("parallel_size: 2", "parallel_size: 2\n  stage_layers: [3, x]"),
     "demo.yaml:6: cluster.stage_layers: (a list of 2): must be a list of layer counts, by stage"),
    (BASE + "zzz: 1\n", "demo.yaml:8: zzz: 1: unknown key; valid keys: model, cluster, prefill, sparse, "
     "kv_cache, kv_store, server, data_dir, security"),
    (BASE + "yes: 1\n", "^demo.yaml:8: yes: 1: unknown key"),
    (BASE + "? [a]\n: 1\n", "demo.yaml:8: ?: (a collection): a key must be plain text"),
    (BASE + "  page_size: 32\n", "demo.yaml:8: kv_cache.page_size: 32: given twice; the first is on line 7"),
    (BASE.replace("64", "48"), "demo.yaml:7: kv_cache.page_size: 48: must be a power of two from 1 to 1024"),
    (BASE.replace("64", "0"), "demo.yaml:7: kv_cache.page_size: 0: must be a power of two from 1 to 1024"),
    (BASE.replace("64", "2048"), "demo.yaml:7: kv_cache.page_size: 2048: must be a power of two from 1 to 1024"),
    (BASE.replace("64", "'64'"), 'demo.yaml:7: kv_cache.page_size: "64": must be a power of two from 1 to 1024'),
    (BASE.replace("64", "64.0"), "demo.yaml:7: kv_cache.page_size: 64.0: must be a power of two from 1 to 1024"),
    (BASE.replace("64", "true"), "demo.yaml:7: kv_cache.page_size: true: must be a power of two from 1 to 1024"),
    (BASE.replace("64", "010"), "^demo.yaml:7: kv_cache.page_size: \"010\": must be a power of two"),
    (BASE.replace("64", "1:04"), "^demo.yaml:7: kv_cache.page_size: \"1:04\": must be a power of two"),
    (BASE.replace("64", "9" * 25), "^demo.yaml:7: kv_cache.page_size: 9{25}: must be a power of two"),
    (BASE.replace("64", "9" * 9999), r"^demo.yaml:7: kv_cache.page_size: \"9{56}\.\.\.: must be a power of two"),
    (BASE.replace("64", "x" * 99), r"^demo.yaml:7: kv_cache.page_size: x{57}\.\.\.: must be a power of two"),
    (BASE.replace("64", '"a\\nb"'), r"^demo.yaml:7: kv_cache.page_size: a\\nb: must be a power of two"),
    (BASE.replace("4k", "-4k"), "^demo.yaml:3: model.max_model_len: -4k: must be a whole number such as"),
    (BASE.replace("4k", "4.5"), "^demo.yaml:3: model.max_model_len: 4.5: must be a whole number such as"),
    (BASE.replace("4k", ".nan"), "^demo.yaml:3: model.max_model_len: nan: must be a whole number such as"),
    (BASE.replace("4k", "0"), "^demo.yaml:3: model.max_model_len: 0: must be a whole number such as"),
    (BASE.replace("size: 2", "size: two"),
     "demo.yaml:5: cluster.pipeline_parallel_size: two: must be a whole number of at least 1"),
    (BASE + "  fraction: .inf\n", "demo.yaml:8: kv_cache.fraction: inf: must be a number above 0 and at most 1"),
    (BASE + "  fraction: 1.01\n", "demo.yaml:8: kv_cache.fraction: 1.01: must be a number above 0 and at most 1"),
    (BASE + "  fraction: 0\n", "demo.yaml:8: kv_cache.fraction: 0: must be a number above 0 and at most 1"),
    (BASE + "  fraction: 1e-1\n", "^demo.yaml:8: kv_cache.fraction: 1e-1: must be a number above 0"),
    (BASE + "  bytes: 1XB\n", "^demo.yaml:8: kv_cache.bytes: 1XB: must be a size in bytes such as"),
    (BASE + "  bytes: 1GiB\n  fraction: 0.5\n",
     "demo.yaml:9: kv_cache.fraction: 0.5: give either kv_cache.bytes or kv_cache.fraction, not both"),
    (BASE + "server: {port: 65536}\n",
     "demo.yaml:8: server.port: 65536: must be a whole number from 0 (no door) to 65535"),
    (BASE + "server:\n  host: 0.0.0.0\n",
     "demo.yaml:9: server.host: 0.0.0.0: is not a loopback address; use 127.0.0.1, or give security.api_keys_file with "
     "tls_cert_file and tls_key_file, or say security.allow_insecure_bind: true"),
    (BASE + "server: {host: 'a b'}\n", "demo.yaml:8: server.host: a b: must be a host name or an IP address"),
    (BASE + "security:\n  allow_insecure_bind: 1\n",
     "demo.yaml:9: security.allow_insecure_bind: 1: must be true or false"),
    (BASE + "security: {tls_cert_file: a.pem}\n",
     "demo.yaml:8: security.tls_key_file: (missing): security.tls_cert_file and security.tls_key_file go together; "
     "give both or neither"),
    (BASE + "security: {tls_key_file: a.key}\n",
     "demo.yaml:8: security.tls_cert_file: (missing): security.tls_cert_file and security.tls_key_file go together; "
     "give both or neither"),
    (BASE + "security: {tls_client_ca_file: ca.pem}\n", "^demo.yaml:8: security.tls_client_ca_file: ca.pem: needs TLS"),
    (BASE + "security: {api_keys_file: 7}\n", "demo.yaml:8: security.api_keys_file: 7: must be the path of a file"),
    (BASE + "server: {max_queued_jobs: 0}\n", "^demo.yaml:8: server.max_queued_jobs: 0: must be a whole number of at"),
    (BASE + "server: {max_streams: 4097}\n",
     "demo.yaml:8: server.max_streams: 4097: must be a whole number from 1 to 4096"),
    (BASE + "server: {max_document_bytes: 0}\n", "^demo.yaml:8: server.max_document_bytes: 0: must be a size in bytes"),
    (BASE + "server: {max_documents_bytes: 0}\n",
     "^demo.yaml:8: server.max_documents_bytes: 0: must be a size in bytes"),
    (BASE + "server: {max_documents_bytes: 1MiB}\n",
     "demo.yaml:8: server.max_documents_bytes: 1MiB: is below server.max_document_bytes; must have room for one"),
    (BASE + "server: {result_ttl_s: 7d}\n", "^demo.yaml:8: server.result_ttl_s: 7d: must be a number of seconds above"),
    (BASE + "server: {document_ttl_s: 0}\n", "^demo.yaml:8: server.document_ttl_s: 0: must be a number of seconds"),
    (BASE + "server: {drain_timeout_s: .inf}\n", "^demo.yaml:8: server.drain_timeout_s: inf: must be a number of sec"),
    (BASE + "server: {port: 9000, metrics_port: 9000}\n",
     "demo.yaml:8: server.metrics_port: 9000: is server.port too; give each its own port"),
    (BASE + "server: {port: 9000, http_port: 9000}\n",
     "demo.yaml:8: server.http_port: 9000: is server.port too; give each its own port"),
    (BASE + "server: {metrics_port: 9000, http_port: 9000}\n",
     "demo.yaml:8: server.http_port: 9000: is server.metrics_port too; give each its own port"),
    (BASE + "server: {http_host: 0.0.0.0}\n",
     "demo.yaml:8: server.http_host: 0.0.0.0: is not a loopback address; use 127.0.0.1, or give security.api_keys_file "
     "with tls_cert_file and tls_key_file, or say security.allow_insecure_bind: true"),
    (BASE + "server: {http_reasoning_field: thoughts}\n",
     "demo.yaml:8: server.http_reasoning_field: thoughts: must be one of both, reasoning, "
     "reasoning_content"),
    (BASE + "server: {max_batch_jobs: 0}\n",
     "demo.yaml:8: server.max_batch_jobs: 0: must be a whole number from 1 to 4096"),
    (BASE + "server: {http_max_tokens: 0}\n", "demo.yaml:8: server.http_max_tokens: 0: must be a whole number "
     "such as 4096, 1_000, 256k (256000) or 256K (262144), from 1 to 1073741824"),
    (BASE + "server: {metrics_host: 0.0.0.0}\n",
     "demo.yaml:8: server.metrics_host: 0.0.0.0: is not a loopback address, and metrics have neither keys nor TLS; "
     "use 127.0.0.1, or say security.allow_insecure_bind: true"),
    (BASE + "server: {metrics_host: 'a b'}\n", "demo.yaml:8: server.metrics_host: a b: must be a host name or an IP "
     "address"),
    (BASE.replace("  pipe", "  address: 1.2.3.4\n  pipe"),
     "demo.yaml:5: cluster.address: 1.2.3.4: must be local, auto, or the host:port of a Ray head"),
    (BASE.replace("  pipe", "  address: a:99999\n  pipe"), "^demo.yaml:5: cluster.address: a:99999: must be local"),
    (BASE.replace("  pipe", "  device: tpu\n  pipe"), "demo.yaml:5: cluster.device: tpu: must be one of cpu, cuda"),
    (BASE.replace("  path", "  dtype: float16\n  path"),
     "demo.yaml:2: model.dtype: float16: must be one of auto, bfloat16, float32"),
    (BASE.replace("  path", "  document_prompt: '{question}{document}'\n  path"),
     r"^demo.yaml:2: model.document_prompt: {question}{document}: must contain {document} once and after it"),
    (BASE.replace("  path", "  document_prompt: '{document}{question'\n  path"),
     "^demo.yaml:2: model.document_prompt: "),
    (BASE.replace("  path", "  chat_template: ../x.jinja\n  path"),
     r"^demo.yaml:2: model.chat_template: ../x.jinja: must be the name of one of the model.s chat templates, or of a"),
    (BASE.replace("  path", "  tool_parser: hermes\n  path"),
     "demo.yaml:2: model.tool_parser: hermes: must be one of auto, qwen3_json, qwen3_xml, none"),
    (BASE.replace("  path", "  chat_template: ''\n  path"), "^demo.yaml:2: model.chat_template: .* must be the name"),
    (BASE.replace("  path", "  rope_scaling: {rope_type: yarn}\n  path"),
     "demo.yaml:2: model.rope_scaling.factor: (missing): required with rope_type yarn; it is never inferred"),
    (BASE.replace("  path", "  rope_scaling: {type: yarn}\n  path"),
     r"^demo.yaml:2: model.rope_scaling.\w+: .* \(and 1 more\)$"),
    (BASE.replace("4k", "x").replace("64", "x"), r"^demo.yaml:3: model.max_model_len: x: .* \(and 1 more\)$"),
    (BASE.replace("64", "x") + "zzz: 1\nmodel: {}\n", r"^demo.yaml:7: kv_cache.page_size: x: .* \(and 2 more\)$"),
    (BASE + "  bytes: !!python/object/apply:os.system [ls]\n",
     "demo.yaml:8: kv_cache.bytes: tag:yaml.org,2002:python/object/apply:os.system: tags are not supported; "
     "write a plain value"),
    (BASE + "  bytes: !x 1\n", "demo.yaml:8: kv_cache.bytes: !x: tags are not supported; write a plain value"),
    (BASE + "data_dir: &a [*a]\n",
     "demo.yaml:8: not valid YAML: *a: anchors and aliases are not supported; write the value out"),
    ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", r"^demo.yaml:2: not valid YAML: \*a: anchors and aliases"),
    ("model: &m {path: x}\nserver:\n  <<: {port: 1}\n", "^demo.yaml:3: server.<<: .a merge key.: merge keys are not"),
    ("a: " + "[" * 5000, "demo.yaml:1: not valid YAML: nested deeper than 16 levels"),
    ("a: " + "{a: " * 20 + "}" * 20, "demo.yaml:1: not valid YAML: nested deeper than 16 levels"),
    (BASE + "a: b: c\n", "demo.yaml:8: not valid YAML: mapping values are not allowed here"),
    (BASE + "\tx: 1\n", "^demo.yaml:8: not valid YAML: "),
    (BASE + "x: 'open\n", "^demo.yaml:9: not valid YAML: "),
    (BASE + "x: [1\n", "^demo.yaml:9: not valid YAML: "),
    (BASE + "---\nx: 1\n", "^demo.yaml:8: not valid YAML: "),
    (BASE + 'x: "\\UFFFFFFFF"\n', "^demo.yaml:8: not valid YAML: "),
    (BASE + "data_dir: \"\\ud800\"\n", r"^demo.yaml:8: data_dir: \\ud800: must not contain half of a surrogate"),
    ("%YAML " + "9" * 5000 + ".1\n---\na: 1\n", "^demo.yaml:1: not valid YAML: "),
    (BASE + "x: \x07\n", "demo.yaml:8: not valid YAML: character #x0007 is not allowed"),
    (b"model:\n  path: \xff\n", "demo.yaml:2: not UTF-8 text (byte 0xff)"),
    (BASE.encode("utf-16"), "demo.yaml:1: not UTF-8 text (byte 0xff)"),
    ("#" * (1 << 20) + "\n", "demo.yaml: larger than 1048576 bytes: this is not a configuration file"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), BAD, ids=range(len(BAD)))
def test_bad_files_are_one_line(tmp_path: Path, text: str | bytes, expected: str) -> None:
    message = message_of(write(tmp_path, text))
    if expected.startswith("^"):
        assert re.search(expected, message), message
    else:
        assert message == expected


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert message_of(tmp_path / "no.yaml") == "no.yaml: no such file"
    assert message_of(tmp_path / "a\nb.yaml") == r"a\nb.yaml: no such file"
    assert message_of(tmp_path).endswith(": is a directory; name the YAML file inside it")
    assert "cannot be read" in message_of(Path("a\0b.yaml"))
    assert "cannot be read" in message_of(tmp_path / ("x" * 5000))


def test_minimal_file_has_the_documented_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(write(tmp_path, "model: {path: sub/../needle}\nserver:\n"))
    assert config.model.path == tmp_path / "needle"
    assert config.model.served_model_name == "needle"
    assert config.model.max_model_len is None
    assert config.model.rope_scaling is None
    assert config.model.chat_template is None
    assert config.model.tool_parser == "auto"
    assert config.model.document_prompt == "{document}\nQuestion: {question}"
    assert (config.cluster.address, config.cluster.num_actors, config.cluster.device) == ("local", 1, "cpu")
    assert (config.cluster.load_timeout_s, config.cluster.step_timeout_s) == (600, 3600)
    assert (config.prefill.max_num_batched_tokens, config.prefill.max_num_seqs) == (2048, 16)
    assert (config.kv_cache.bytes, config.kv_cache.fraction, config.kv_cache.page_size) == (None, None, 64)
    assert (config.server.host, config.server.port) == ("127.0.0.1", 0)
    assert config.data_dir == Path("/home/someone/.local/share/longreach")
    assert config.security.allow_insecure_bind is False
    server, security = config.server, config.security
    assert (server.max_queued_jobs, server.max_document_bytes, server.max_streams) == (256, 64 << 20, 128)
    assert server.max_documents_bytes == 16 << 30
    assert (server.result_ttl_s, server.document_ttl_s, server.drain_timeout_s) == (604_800, 604_800, 30)
    assert server.metrics_port == 0
    assert (security.api_keys_file, security.tls_cert_file) == (None, None)
    assert (security.tls_key_file, security.tls_client_ca_file) == (None, None)


def test_values_are_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    text = """\
model: {path: ~/m, served_model_name: 'yes', max_model_len: 256K, document_prompt: "{document}{{}} {question}",
  chat_template: rag, tool_parser: qwen3_xml}
cluster: {address: "[::1]:6379", cpus_per_actor: 1, network_interface: eth0}
kv_cache: {bytes: 1.5GB, page_size: 1}
server: {host: 0.0.0.0, port: 65535}
security: {allow_insecure_bind: on}
data_dir: 2024-01-01
"""
    config = load_config(write(tmp_path, "\ufeff" + text))
    assert config.model.path == Path("/home/someone/m")
    assert config.model.served_model_name == "yes"
    assert config.model.max_model_len == 262_144
    assert config.model.chat_template == "rag"
    assert config.model.tool_parser == "qwen3_xml"
    assert config.model.document_prompt.format(document="d", question="q") == "d{} q"
    assert config.cluster.cpus_per_actor == 1.0
    assert (config.kv_cache.bytes, config.kv_cache.fraction) == (1_500_000_000, None)
    assert config.data_dir == tmp_path / "2024-01-01"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("::", False), ("example.org", False)],
)
def test_only_loopback_needs_no_permission(tmp_path: Path, host: str, loopback: bool) -> None:
    path = write(tmp_path, f"{BASE}server: {{host: '{host}'}}\n")
    if loopback:
        assert load_config(path).server.host == host
    else:
        assert "allow_insecure_bind" in message_of(path)


def test_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, BASE))
    with pytest.raises(ValidationError):
        config.kv_cache.page_size = 128  # type: ignore[misc]


@pytest.mark.parametrize(
    ("cores", "stages", "threads", "cpus", "expected"),
    [
        (2, 4, None, None, (1, 0.5)),
        (16, 2, None, None, (8, 8.0)),
        (17, 2, None, None, (8, 8.0)),
        (16, 2, 3, None, (3, 3.0)),
        (2, 4, 1, 0.25, (1, 0.25)),
        (1, 1, None, None, (1, 1.0)),
    ],
)
def test_threads_and_cpus(
    tmp_path: Path, cores: int, stages: int, threads: int | None, cpus: float | None, expected: tuple[int, float]
) -> None:
    overrides = {
        "cluster.pipeline_parallel_size": stages,
        "cluster.threads_per_actor": threads,
        "cluster.cpus_per_actor": cpus,
    }
    cluster = load_config(write(tmp_path, BASE), overrides).cluster
    assert (cluster.threads(cores), cluster.cpus(cores)) == expected


def test_overrides_replace_before_validation(tmp_path: Path) -> None:
    path = write(tmp_path, BASE.replace("64", "broken"))
    config = load_config(path, {"kv_cache.page_size": 32, "model.max_model_len": "32k", "server.port": 8000,
                                "model.path": tmp_path / "other",
                                "model.rope_scaling": {"rope_type": "yarn", "factor": 8}})  # fmt: skip
    assert config.kv_cache.page_size == 32
    assert config.model.max_model_len == 32_000
    assert config.model.path == tmp_path / "other"
    assert config.server.port == 8000
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.as_mapping() == {"rope_type": "yarn", "factor": 8.0}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"kv_cache.page_size": 3}, "<override>: kv_cache.page_size: 3: must be a power of two from 1 to 1024"),
        ({"kv_cache.pagesize": 3}, "<override>: kv_cache.pagesize: 3: unknown key; did you mean 'page_size'?"),
        ({"kv_cache": 3}, "<override>: kv_cache: 3: must be a mapping"),
        ({"": 3}, "^<override>: : 3: unknown key"),
        ({"a.b.c": 3}, "^<override>: a: .a mapping of 1.: unknown key"),
        ({"model.path.x": 3}, "^<override>: model.path.x: 3: cannot be overridden: model.path is needle, not a map"),
        ({"model": {"path": "x", "dtype": "y"}}, "^<override>: model.dtype: y: must be one of"),
        ({"server.port": 10**5000}, "^<override>: server.port: .an integer of 16610 bits.: must be"),
        ({"cluster.cpus_per_actor": 10**5000}, "^<override>: cluster.cpus_per_actor: .an integer of "),
        ({"cluster.cpus_per_actor": float("nan")}, "^<override>: cluster.cpus_per_actor: nan: must be"),
        ({"server.host": object()}, "^<override>: server.host: .object.: must be"),
        ({"server.port": -1, "prefill.max_num_seqs": 0}, r"^<override>: .* \(and 1 more\)$"),
    ],
)
def test_bad_overrides(tmp_path: Path, overrides: dict[str, object], expected: str) -> None:
    message = message_of(write(tmp_path, BASE), overrides)
    assert re.search(expected, message) if expected.startswith("^") else message == expected


@pytest.mark.parametrize("path", sorted(set(CONFIGS.glob("*.yaml")) - {HARDWARE}), ids=lambda path: path.name)
def test_every_published_config_loads(path: Path) -> None:
    config = load_config(path)
    if config.model.path.is_dir():
        assert load_deployment(path).config == config
    else:
        assert config.model.path.is_absolute()
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}:\d+: model\.path: .*there is no directory"):
            load_deployment(path)


def test_there_are_published_configs() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {"demo", "single", "qwen3-30b-a3b-2gpu"}


DEMO = (CONFIGS / "demo.yaml").read_text()
TOKENS = st.sampled_from(
    ["\n", "  ", ":", ": ", "- ", "{", "}", "[", "]", "&a ", "*a", "!!", "!x ", "<<: ", '"', "'", "|", ">", "%", "@",
     "\t", "#", "?", "---\n", "...", ",", ".nan", "-1", "9" * 40, "null", "\\", "\0", "\x85", "\u2028", "\ufeff", "é",
     "~",
     "1:2", "=", "0x1", "\\ud800", "\\UFFFFFFFF", "!!int ", "!!set ", "{document}", "on"]
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, len(DEMO)), st.integers(0, 30), st.one_of(TOKENS, st.text(max_size=4))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(EDITS)
def test_mutated_files_load_or_fail_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, str]]
) -> None:
    text = DEMO
    for position, removed, inserted in edits:
        text = text[:position] + inserted + text[position + removed :]
    path = write(tmp_path_factory.getbasetemp(), text)
    message = ""
    try:
        assert isinstance(load_config(path), Config)
    except ConfigError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    assert not message or message.startswith(f"{path}:")
    assert len(message) < 600
