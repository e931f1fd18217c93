"""The verbs about API keys: `longreach keys`. They change a file, which a running head reads again by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cluster.cli.common import one_line_errors, say_json, say_text

_PATH = click.Path(path_type=Path, dir_okay=False)
_FILE = "~/.local/share/longreach/keys"
_LIMIT = click.IntRange(1, 1_000_000)


class _Size(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A size in bytes as people write it, such as 512MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from cluster.common.units import UnitError, parse_bytes

        try:
            return parse_bytes(value)
        except UnitError as error:
            self.fail(str(error), param, ctx)


def _file_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--file", "path", type=_PATH, metavar="FILE", default=_FILE, show_default=True,
        help="What security.api_keys_file of the head names.",
    )(command)  # fmt: skip


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys of a head.

    Keys of one name are one tenant: they see the same jobs and documents, and nothing of other names. A head whose
    YAML names the file in security.api_keys_file notices a change within two seconds.

    \b
    longreach keys create team-law --streams 8 --document-bytes 2GiB
    longreach keys create operator --admin          # sees and may change everything
    longreach keys list
    longreach keys revoke team-law                  # its open streams end, its jobs stay
    """


@keys.command("create")
@click.argument("name")
@click.option("--streams", type=_LIMIT, metavar="N", help="At most so many streams, waits and uploads at a time.")
@click.option("--queued-jobs", type=_LIMIT, metavar="N", help="At most so many jobs that wait.")
@click.option("--document-bytes", type=_Size(), metavar="SIZE", help="At most so much of documents, such as 2GiB.")
@click.option("--admin", is_flag=True, help="Sees and may change what others own.")
@_file_option
def create(
    name: str, streams: int | None, queued_jobs: int | None, document_bytes: int | None, admin: bool, path: Path
) -> None:
    """Make a key for NAME and print it. It is shown this once: the file has its SHA-256."""
    from cluster.access.key_file import KeyFile
    from cluster.jobs.tenants.tenant import Tenant

    with one_line_errors():
        key = KeyFile(path.expanduser()).create(Tenant(name, admin, streams, queued_jobs, document_bytes))
        click.echo(f"a key of {name}, in {path}; clients take it from LONGREACH_API_KEY", err=True)
        click.echo(key)


@keys.command("list")
@_file_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def list_keys(path: Path, as_json: bool) -> None:
    """Show names, limits, and the first digits of the SHA-256 of each key."""
    from rich.console import Console

    from cluster.access.key_file import KeyFile
    from cluster.common.units import format_bytes
    from cluster.tools.display import in_table, plain_table

    with one_line_errors():
        found = KeyFile(path.expanduser()).list()
        if as_json:
            say_json({"keys": [{"id": line.id, **asdict(line.tenant)} for line in found]})
            return
        if not found:
            say_text(f"no key in {path}")
            return
        table = plain_table("name", "key", "admin", "streams", "queued jobs", "document bytes")
        for line in found:
            tenant = line.tenant
            size = "" if tenant.max_document_bytes is None else format_bytes(tenant.max_document_bytes)
            limits = ("" if limit is None else str(limit) for limit in (tenant.max_streams, tenant.max_queued_jobs))
            table.add_row(in_table(tenant.name), line.id, "yes" if tenant.is_admin else "", *limits, size)
        Console().print(table)


@keys.command("revoke")
@click.argument("name")
@click.option("--key", "key_id", default="", metavar="DIGITS", help="Only the key whose SHA-256 begins so, see list.")
@_file_option
def revoke(name: str, key_id: str, path: Path) -> None:
    """Remove the keys of NAME. Its jobs and documents stay, for the next key of that name and for admins."""
    from cluster.access.key_file import KeyFile

    with one_line_errors():
        gone = KeyFile(path.expanduser()).revoke(name, key_id)
        say_text(f"revoked {gone} key{'s' if gone > 1 else ''} of {name}")


VERBS: tuple[click.Command, ...] = (keys,)
