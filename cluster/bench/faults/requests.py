"""Faults of what is sent: broken bytes, documents that cannot be used, ids that are paths."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cluster.bench.faults.rig import FaultHead, Rig, Verdict, random_prompt
from cluster.bench.history import History
from cluster.bench.recorder import Recorder, Refused
from cluster.server.grpc_server import JOBS_SERVICE
from protos.jobs import jobs_pb2 as pb

_METHODS = pb.DESCRIPTOR.services_by_name["Jobs"].methods
_NEVER = ("UNKNOWN", "INTERNAL", "DATA_LOSS", "DEADLINE_EXCEEDED", "UNAVAILABLE")
_TEXTS = ("", "x", "a" * 300, "job_" + "0" * 32, "doc_" + "0" * 32, "\u0000", "é", "../x", "k")


def filled(message: Message, draw: random.Random, depth: int = 0) -> Message:
    """Set fields of a message to values of their types, drawn at random; returns it."""
    for item in message.DESCRIPTOR.fields:
        if draw.random() < 0.4 or (item.containing_oneof is not None and draw.random() < 0.5):
            continue
        if item.message_type is not None:
            if depth < 3 and not item.message_type.GetOptions().map_entry:
                inner = getattr(message, item.name)
                filled(inner.add() if item.is_repeated else inner, draw, depth + 1)
            continue
        value = _value(item, draw)
        try:
            if item.is_repeated:
                getattr(message, item.name).append(value)
            else:
                setattr(message, item.name, value)
        except (ValueError, TypeError):
            continue  # out of the range of the field
    return message


def _value(item: Any, draw: random.Random) -> Any:
    match item.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            text = draw.choice(_TEXTS)
            return text.encode() if item.type == FieldDescriptor.TYPE_BYTES else text
        case FieldDescriptor.CPPTYPE_BOOL:
            return draw.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return draw.choice([0.0, -1.0, 0.01, 1e300, float("nan"), float("inf")])
        case FieldDescriptor.CPPTYPE_ENUM:
            return draw.randrange(8)
    return draw.choice([0, 1, 2, 77, (1 << 31) - 1, (1 << 32) - 1])


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """Flip, cut, insert or replace bytes of a message."""
    data = bytearray(raw)
    match draw.randrange(5):
        case 0:
            for _ in range(draw.randint(1, 6) if data else 0):
                data[draw.randrange(len(data))] = draw.randrange(256)
        case 1:
            del data[draw.randrange(len(data) + 1) :]
        case 2:
            at = draw.choice([0, len(data)])
            data[at:at] = bytes([draw.randrange(8, 128)]) + draw.randbytes(draw.randint(0, 12))
        case 3:
            data = bytearray(draw.randbytes(draw.randint(0, 200)))
    return bytes(data)


def malformed_grpc(rig: Rig, seed: int) -> Verdict:
    """Broken bytes to every method: a status that says so, and the head goes on."""
    draw, verdict, history = random.Random(seed), Verdict(), History()
    head = rig.head()
    codes: dict[str, int] = {}
    small = [method for method in _METHODS if method.name not in ("Wait", "Stream")]  # those may wait for long
    with grpc.insecure_channel(head.address) as channel:
        for number in range(10_000 if rig.full else 600):
            method = (_METHODS if number % 10 == 0 else small)[number % len(small)]
            kind = getattr(pb, method.input_type.name)
            raw = [mutated(filled(kind(), draw).SerializeToString(), draw) for _ in range(draw.randint(1, 2))]
            code = _status(channel, f"/{JOBS_SERVICE}/{method.name}", raw)
            codes[code] = codes.get(code, 0) + 1
            verdict.expect(code not in _NEVER, f"{method.name} of {raw!r:.300}: {code}")
        known: set[str] = set()
        with Recorder(head.address, history, "cleaner") as client:
            for job in client.call("List", pb.ListRequest(page_size=1000)).jobs:
                client.call("Cancel", pb.JobRequest(id=job.id))
                known.add(job.id)
    verdict.facts |= {"calls": sum(codes.values()), "codes": codes, "jobs_made": len(known)}
    return _still_serves(rig, head, verdict, seed)


def _status(channel: grpc.Channel, path: str, raw: Sequence[bytes]) -> str:
    try:
        for _ in channel.stream_stream(path)(iter(raw), timeout=20):
            pass
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def _still_serves(rig: Rig, head: FaultHead, verdict: Verdict, seed: int) -> Verdict:
    """Run a job, which must be as undisturbed, and check that nothing is left of the others."""
    history, request = History(), random_prompt(seed + 7_000, 300)
    with Recorder(head.address, history, "after") as client:
        job = client.submit("after", request, f"after {seed}")
        client.follow(job)
        client.wait(job)
        status = client.call("ClusterStatus", pb.ClusterStatusRequest())
    verdict.expect(not status.running, f"{status.running} jobs still run")
    verdict.expect(not status.problem, f"problem: {status.problem}")
    return rig.judge(verdict, history, {"after": request})


def _refusals(head: FaultHead, verdict: Verdict, calls: Iterable[tuple[str, str, Any]], part: str = "") -> None:
    """Make calls (what, method, request or requests), each refused as INVALID_ARGUMENT with `part` in the reason."""
    with grpc.insecure_channel(head.address) as channel:
        for what, method, request in calls:
            shown = _outcome(channel, method, request)
            is_right = shown.startswith("INVALID_ARGUMENT: ") and part in shown and len(shown.splitlines()) == 1
            verdict.expect(is_right, f"{what}: {shown[:300]}")
            verdict.facts[what] = shown[:300]


def _outcome(channel: grpc.Channel, method: str, request: Any) -> str:
    """Return code and details of a call, "OK" if it was accepted."""
    raw = [one.SerializeToString() for one in (request if isinstance(request, list) else [request])]
    try:
        for _ in channel.stream_stream(f"/{JOBS_SERVICE}/{method}")(iter(raw), timeout=30):
            pass
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    return "OK"


def _documents(head: FaultHead) -> set[str]:
    with head.client() as client:
        return {document.id for document in client.documents.list()}


def _upload(*data: bytes) -> list[pb.DocumentPiece]:
    return [pb.DocumentPiece(header=pb.DocumentHeader(name="d")), *(pb.DocumentPiece(data=part) for part in data)]


def _asking(text: str, *questions: str) -> pb.SubmitRequest:
    return pb.SubmitRequest(document=pb.DocumentQuestions(text=text, questions=list(questions) or ["?"]))


def over_long_documents(rig: Rig, seed: int) -> Verdict:
    """A document, a prompt, ids and a chat of more tokens than the context: refused with numbers, nothing is kept."""
    verdict, head = Verdict(), rig.head()
    before = _documents(head)
    text = "The code of old stone is 12345. " * 20_000
    calls = [
        ("a long text", "Submit", _asking(text)),
        ("a long prompt", "Submit", pb.SubmitRequest(prompt=text)),
        ("many ids", "Submit", random_prompt(seed, 45_000)),
        ("a long question", "Submit", _asking("short", text)),
    ]
    _refusals(head, verdict, calls, "max_model_len")
    verdict.expect(_documents(head) == before, "a refused document was kept")
    return _still_serves(rig, head, verdict, seed)


def empty_documents(rig: Rig, seed: int) -> Verdict:
    """Nothing at all, in every place: refused."""
    verdict, head = Verdict(), rig.head()
    calls = [
        ("no text", "Submit", _asking("")),
        ("no question", "Submit", pb.SubmitRequest(document=pb.DocumentQuestions(text="x"))),
        ("an empty question", "Submit", _asking("x", "")),
        ("no input", "Submit", pb.SubmitRequest()),
        ("no ids", "Submit", pb.SubmitRequest(token_ids=pb.TokenIds())),
        ("no messages", "Submit", pb.SubmitRequest(chat=pb.Chat())),
        ("an upload without data", "UploadDocument", _upload()),
        ("an upload of nothing", "UploadDocument", _upload(b"")),
        ("an upload without a message", "UploadDocument", []),
        ("an upload without a header", "UploadDocument", [pb.DocumentPiece(data=b"x")]),
    ]
    _refusals(head, verdict, calls)
    return _still_serves(rig, head, verdict, seed)


def huge_documents(rig: Rig, seed: int) -> Verdict:
    """More bytes than `server.max_document_bytes`: refused while they come, and neither memory nor disk is used up."""
    draw, verdict, head = random.Random(seed), Verdict(), rig.head()
    before = _documents(head)
    resident = head.find("head")[0].memory_info().rss
    size = 80 << 20  # the limit is 64 MiB
    data = draw.randbytes(1 << 19).hex().encode()
    _refusals(head, verdict, [("80 MiB", "UploadDocument", _upload(*[data] * (size >> 20)))])
    grown = head.find("head")[0].memory_info().rss - resident
    verdict.facts["head_grew_mib"] = grown >> 20
    verdict.expect(grown < 64 << 20, f"the head grew by {grown >> 20} MiB")
    verdict.expect(_documents(head) == before, "a refused document was kept")
    left = [path.name for path in (head.data / "documents").iterdir() if path.stem not in before]
    verdict.expect(not left, f"files of refused uploads: {left}")
    return _still_serves(rig, head, verdict, seed)


def documents_that_are_not_utf8(rig: Rig, seed: int) -> Verdict:
    """Bytes that are no text: refused, when they come or when a job needs them."""
    draw, verdict, head = random.Random(seed), Verdict(), rig.head()
    before = _documents(head)
    bad: list[Any] = [
        b"\xff",
        b"ok \xc3\x28",
        b"\xed\xa0\x80",
        b"cut \xe2\x82",
        b"\xfe\xff\x00a",
        b"a" * 70_000 + b"\x80",
    ]
    bad += [draw.randbytes(draw.randint(20, 3000)) + b"\xff" for _ in range(5)]
    bad = [*([one] for one in bad), [b"x\xe2", b"\x82"]]  # the last one: a character cut at the end of a piece
    with Recorder(head.address, History(), "uploads", patience_s=0) as client:
        for number, parts in enumerate(bad):
            try:
                document = client.call("UploadDocument", _upload(*parts))
            except Refused as error:
                verdict.facts[f"upload {number}"] = str(error)[:200]
                verdict.expect("INVALID_ARGUMENT" in str(error) and "UTF-8" in str(error), f"upload {number}: {error}")
                continue
            asked = pb.SubmitRequest(document=pb.DocumentQuestions(document_id=document.id, questions=["?"]))
            _refusals(head, verdict, [(f"job about upload {number}", "Submit", asked)], "UTF-8")
            client.call("DeleteDocument", pb.DocumentRequest(id=document.id))
    whole = Recorder(head.address, History(), "whole")
    document = whole.call("UploadDocument", _upload(f"{seed} x\xe2".encode("latin-1"), b"\x82\xac"))
    verdict.expect(document.size_bytes, "a character in two pieces was not put together")
    whole.call("DeleteDocument", pb.DocumentRequest(id=document.id))
    whole.close()
    verdict.expect(_documents(head) == before, "a refused document was kept")
    return _still_serves(rig, head, verdict, seed)


def path_traversal(rig: Rig, seed: int) -> Verdict:
    """Ids that are paths, in every field that takes an id: refused, and no file is read, made or removed."""
    verdict, head = Verdict(), rig.head()
    secret = head.folder / "secret.txt"
    secret.write_text("outside of the data directory")
    before = _tree(head.folder)
    paths = [
        "../secret.txt", "../../etc/passwd", str(secret), "doc_/../../secret.txt", "job_../jobs.sqlite", "..", ".",
        "doc_" + "0" * 29 + "/..", "doc_%2e%2e%2fsecret.txt", "doc_" + "0" * 32 + "\x00", "doc_" + "0" * 32 + "\n",
        "doc_" + "A" * 32, "..\\secret.txt", "~root", "file:///etc/passwd", "doc_" + "０" * 32,
    ]  # fmt: skip
    calls = []
    with grpc.insecure_channel(head.address) as channel:
        unknown = "0" * 32
        have = [
            method for method in _METHODS if any(item.name == "id" for item in method.input_type.fields)
            and "UNIMPLEMENTED" not in _outcome(channel, method.name, getattr(pb, method.input_type.name)(id=unknown))
        ]  # fmt: skip
    for path in paths:
        calls.append((f"Submit {path!r}", "Submit", pb.SubmitRequest(
            document=pb.DocumentQuestions(document_id=path, questions=["?"]))))  # fmt: skip
        for method in have:
            calls.append((f"{method.name} {path!r}", method.name, getattr(pb, method.input_type.name)(id=path)))
    _refusals(head, verdict, calls)
    verdict.facts = {"calls": len(calls), "paths": len(paths), "methods": [method.name for method in have]}
    verdict.expect(_tree(head.folder) == before, f"files changed: {sorted(_tree(head.folder) ^ before)[:5]}")
    return _still_serves(rig, head, verdict, seed)


def _tree(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if "sqlite" not in path.name}
