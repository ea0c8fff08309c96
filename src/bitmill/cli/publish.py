"""``bitmill publish``: a sweep's folder as people publish it, and its way to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitmill.cli import say
from bitmill.cli.options import Force, Json
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.sweep.publish import Folder

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder of a finished sweep.", show_default=False)
]
Repo = Annotated[
    str | None,
    typer.Option(
        "--repo",
        metavar="ORG/NAME",
        help="The repository on the hub; the card's title, too.",
        show_default=False,
    ),
]
License = Annotated[
    str | None,
    typer.Option("--license", help="The model's license, for the card: apache-2.0.", show_default=False),
]


def publish(
    directory: Directory,
    repo: Repo = None,
    license_: License = None,
    push: Annotated[bool, typer.Option("--push", help="Upload it to --repo.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be published; write and upload nothing.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn the folder of a sweep into what a publisher puts on the hub.

    Every output of the sweep, a model card with the measured table, a picture of size against loss,
    SHA256SUMS, the page, and the commands that make each file again. --push uploads these files and no
    others; log in first with `hf auth login`.

        bitmill sweep org/name --ladder gguf -o name-GGUF
        bitmill publish name-GGUF --license apache-2.0
        bitmill publish name-GGUF --repo me/name-GGUF --push
    """
    from bitmill.sweep.publish import check_repo, opened, write

    if push and repo is None:
        raise Refused("--push needs a repository", fix="--repo ORGANISATION/NAME")
    if repo is not None:
        check_repo(repo)
    folder = opened(directory)
    if not dry_run:
        write(folder, repo=repo, license_=license_, force=force)
    listed = [
        (name, (directory / name).stat().st_size if (directory / name).is_file() else None)
        for name in folder.files
    ]
    if push and not dry_run and repo is not None:
        _upload(folder, repo, private)
    if json:
        files = [{"file": name, "bytes": bytes_} for name, bytes_ in listed]
        say.emit({"folder": str(directory), "repo": repo, "pushed": push and not dry_run, "files": files})
        return
    rows = [(name, "to be made" if bytes_ is None else say.size(bytes_)) for name, bytes_ in listed]
    say.result(say.table(("file", "size"), rows, right=(1,)))
    say.result()
    if push:
        done = "would be uploaded" if dry_run else "uploaded"
        say.result(f"{len(listed)} files, {say.size(folder.bytes_)}, {done} to {repo}")
    else:
        done = "would be published" if dry_run else "ready to be published"
        say.result(f"{len(listed)} files, {say.size(folder.bytes_)}, {done}: {directory}")


def _upload(folder: Folder, repo: str, private: bool) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    from bitmill.sweep.publish import push

    try:
        push(folder, repo, HfApi(), private=private)
    except (HfHubHTTPError, LocalTokenNotFoundError, ConnectionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Refused(
            f"the hub did not take it: {reason}", where=repo, fix="hf auth login, then the same command again"
        ) from error
