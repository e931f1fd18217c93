"""The verbs about documents: `longreach docs` and `longreach tokens`. Exit codes are those of the job verbs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cluster.cli import output
from cluster.cli.common import EXIT_INPUT, Count, fail, one_line_errors, say, say_json, say_text, slow_progress
from cluster.cli.jobs import head_options, open_client
from cluster.client.client import Client
from cluster.client.ingest.source import DocumentText
from cluster.client.models import Document, TokenCount

_PATH = click.Path(path_type=Path)
_read_option = click.option("--read", is_flag=True, help="Read it now, so that a question is answered at once later.")
_encoding_option = click.option("--encoding", metavar="NAME", help="Of text files; by default it is found out.")
_document_argument = click.argument("document_id", metavar="ID")


class _DocsGroup(click.Group):
    """`longreach docs` alone lists; options of the head may stand before the action or after it."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return super().get_command(ctx, "delete" if name == "rm" else name)


@click.group(cls=_DocsGroup, invoke_without_command=True)
@head_options
@click.pass_context
def docs(ctx: click.Context, /, **options: Any) -> None:
    """Keep documents on a head: add once, ask often. Without an action: list them.

    A document is a text, or what is made one: code, PDF, Word, Excel, PowerPoint, EPUB, HTML (the last six need
    longreach[docs]), or a folder, zip or tar of text and code. What is on its way to the head is read on this machine.

    \b
    longreach docs add contract.pdf --read          # read over night ...
    longreach submit --document doc_0123... --question "What was agreed?" --stream
    longreach docs add project/ --max-tokens 400k   # may grow to this length
    longreach docs append doc_0123... tuesday.md    # a new document; only what was added is read
    longreach docs export doc_0123... contract.longreach
    """
    if ctx.invoked_subcommand is None:
        with open_client(options) as client:
            output.print_documents(client.documents.list(), options["as_json"])


def _merged(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of an action, and what was said before its name where it says nothing."""
    context = click.get_current_context().parent
    before = context.params if context is not None else {}
    return {name: value or before.get(name) for name, value in options.items()} | {"as_json": _is_json(options, before)}


def _is_json(options: dict[str, Any], before: dict[str, Any]) -> bool:
    return bool(options["as_json"] or before.get("as_json"))


@docs.command("list")
@head_options
def list_documents(**options: Any) -> None:
    """List the documents, newest first, with the part of each whose KV is stored."""
    options = _merged(options)
    with open_client(options) as client:
        output.print_documents(client.documents.list(), options["as_json"])


@docs.command()
@click.argument("sources", nargs=-1, required=True, metavar="FILE|FOLDER...", type=_PATH)
@click.option("--together", is_flag=True, help="Make all of them one document, in this order.")
@click.option("--name", help="A name for people, of a single document. Default: that of the file.")
@_read_option
@click.option("--max-tokens", type=Count(), help="Length that it may grow to; see docs append.")
@click.option("--pin", is_flag=True, help="Keep it, with its stored KV, until it is unpinned or deleted.")
@click.option("--share", is_flag=True, help="Let every API key of the head read it and ask about it.")
@_encoding_option
@head_options
def add(
    sources: tuple[Path, ...], together: bool, name: str | None, read: bool, max_tokens: int | None, pin: bool,
    share: bool, encoding: str | None, **options: Any,
) -> None:  # fmt: skip
    """Add documents and print their ids; the same text has the same id.

    \b
    longreach docs add report.txt
    longreach docs add --together --name minutes monday.md tuesday.md
    longreach docs add . --read --pin
    """
    options = _merged(options)
    if name is not None and len(sources) > 1 and not together:
        fail("--name: there are several documents; give one at a time, or --together", EXIT_INPUT)
    added = []
    with open_client(options) as client, slow_progress(options["as_json"]) as progress:
        for source in [list(sources)] if together else [[source] for source in sources]:
            text = output.read_paths(source, encoding, progress)
            document = client.documents.add(
                text, name=name, max_tokens=max_tokens, pinned=pin, shared=share, progress=progress
            )
            added.append(_finish(client, document, read, options))
    if options["as_json"]:
        say_json(added)


@docs.command()
@_document_argument
@click.argument("sources", nargs=-1, required=True, metavar="FILE|FOLDER...", type=_PATH)
@click.option("--name", help="A name for the new document.")
@_read_option
@_encoding_option
@head_options
def append(
    document_id: str, sources: tuple[Path, ...], name: str | None, read: bool, encoding: str | None, **options: Any
) -> None:
    """Make a new document, that of ID with the files after it, and print its id. That of ID stays.

    Jobs about it read only what was added, when its length is within the --max-tokens that the first was added with.
    """
    options = _merged(options)
    with open_client(options) as client, slow_progress(options["as_json"]) as progress:
        text = output.read_paths(sources, encoding, progress)
        document = client.documents.append(document_id, text, name=name, progress=progress)
        shown = _finish(client, document, read, options)
    if options["as_json"]:
        say_json(shown)


def _finish(client: Client, document: Document, read: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Print the id of a new document at once; return what `--json` prints of it, with the job that reads it."""
    if not options["as_json"]:
        say(document.id)
    if not read:
        return asdict(document)
    job = client.documents.read(document.id)
    say(f"reading it: longreach wait {job.id}", err=True)
    return asdict(document) | {"read_job": job.id}


@docs.command()
@_document_argument
@head_options
def show(document_id: str, **options: Any) -> None:
    """Show everything about one document."""
    options = _merged(options)
    with open_client(options) as client:
        output.print_document(client.documents.get(document_id), options["as_json"])


@docs.command()
@_document_argument
@click.option("--wait", "then_wait", is_flag=True, help="Wait until it has been read.")
@head_options
def read(document_id: str, then_wait: bool, **options: Any) -> None:
    """Read a document, so that its KV is there for questions to come; print the id of the job."""
    options = _merged(options)
    with open_client(options) as client:
        job = client.documents.read(document_id)
        if not options["as_json"]:
            say(job.id)
        if then_wait:
            output.wait_read(job, options["as_json"])
        if options["as_json"]:
            say_json(job.data.to_json())


def _each(call: Callable[[Client, str], object], verb: str) -> Callable[..., None]:
    """Return the callback of an action on documents by their ids."""

    def run(document_ids: tuple[str, ...], **options: Any) -> None:
        options = _merged(options)
        with open_client(options) as client:
            for document_id in document_ids:
                call(client, document_id)
                if not options["as_json"]:
                    say(f"{document_id} {verb}")
            if options["as_json"]:
                say_json({verb: document_ids})

    return run


def _add_action(name: str, verb: str, call: Callable[[Client, str], object], explanation: str) -> None:
    command = click.argument("document_ids", nargs=-1, required=True, metavar="ID...")(
        head_options(_each(call, verb))
    )  # fmt: skip
    docs.add_command(click.command(name, help=explanation)(command))


_add_action(
    "pin", "pinned", lambda client, name: client.documents.pin(name),
    "Keep documents with their stored KV until they are unpinned or deleted.",
)  # fmt: skip
_add_action(
    "unpin", "unpinned", lambda client, name: client.documents.unpin(name),
    "Let documents expire again, some time after their last use.",
)  # fmt: skip
_add_action(
    "delete", "removed", lambda client, name: client.documents.delete(name),
    "Delete documents with all KV that no other document has. Fails while a job needs one (exit 2).",
)  # fmt: skip


@docs.command()
@_document_argument
@click.argument("path", metavar="FILE", type=_PATH)
@click.option("--without-kv", is_flag=True, help="Text and tokens only; it must be read again elsewhere.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@head_options
def export(document_id: str, path: Path, without_kv: bool, force: bool, **options: Any) -> None:
    """Write a document with its stored KV to FILE: read on the big machine, ask on the small one.

    \b
    longreach docs export doc_0123... contract.longreach
    longreach docs import contract.longreach             # on the other machine
    """
    from cluster.common.units import format_bytes

    options = _merged(options)
    with open_client(options) as client, slow_progress(options["as_json"]) as progress:
        size = client.documents.export(document_id, path, kv=not without_kv, overwrite=force, progress=progress)
    if options["as_json"]:
        say_json({"path": str(path), "size_bytes": size})
    else:
        say(f"{path}: {format_bytes(size)}")


@docs.command("import")
@click.argument("path", metavar="FILE", type=_PATH)
@head_options
def import_document(path: Path, **options: Any) -> None:
    """Take in a document that docs export wrote, with its KV, and print its id."""
    options = _merged(options)
    with open_client(options) as client, slow_progress(options["as_json"]) as progress:
        document = client.documents.import_(path, progress=progress)
    if options["as_json"]:
        say_json(asdict(document))
    else:
        say(document.id)
        say(f"KV of {document.stored_tokens:,} of {document.tokens:,} tokens is stored", err=True)


@docs.command()
@click.argument("sources", nargs=-1, required=True, metavar="FILE|FOLDER...", type=_PATH)
@_encoding_option
def text(sources: tuple[Path, ...], encoding: str | None) -> None:
    """Print the text that files or folders become as one document; nothing is sent, no head is needed.

    \b
    longreach docs text contract.pdf | less
    """
    with one_line_errors():
        with slow_progress(False) as progress:
            found = output.read_paths(sources, encoding, progress)
        say_text(found.data.decode("utf-8", "replace").removesuffix("\n"))


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="FILE|FOLDER...", type=_PATH)
@click.option("--together", is_flag=True, help="Count them as one document.")
@click.option("--config", type=_PATH, help="Count with the tokenizer of this YAML file's model; needs no head.")
@_encoding_option
@head_options
def tokens(
    sources: tuple[Path, ...], together: bool, config: Path | None, encoding: str | None, **options: Any
) -> None:
    """Count the tokens of documents before they are submitted, and say whether they fit. Exit 1 when one does not.

    Without --config, the running head counts.

    \b
    longreach tokens book.epub
    longreach tokens src/ --config configs/demo.yaml
    """
    names = [" ".join(map(str, sources))] if together else [str(source) for source in sources]
    with slow_progress(options["as_json"]) as progress:
        with one_line_errors():
            given = [list(sources)] if together else [[source] for source in sources]
            texts = [output.read_paths(source, encoding, progress) for source in given]
        progress("counting tokens", 0, 0)
        if config is not None:
            counts = _count_locally(config, texts)
            counter = f"tokenizer of {config}"
        else:
            with open_client(options, way_out="or count without a head: --config CONFIG") as client:
                counts = [client.documents.count_tokens(text, progress=progress) for text in texts]
                counter = f"head at {client.address}"
    output.print_token_counts(names, counts, counter, options["as_json"])


def _count_locally(config: Path, texts: Sequence[DocumentText]) -> list[TokenCount]:
    from cluster.tools.count_tokens import count_tokens

    with one_line_errors():
        counts, limit = count_tokens(config, [text.data for text in texts])
    return [TokenCount(count, len(text.data), limit) for count, text in zip(counts, texts, strict=True)]


VERBS: tuple[click.Command, ...] = (docs, tokens)
