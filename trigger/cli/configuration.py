"""`trigpoint config`: is a configuration right, and what can stand in it."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from trigger.cli import show
from trigger.cli.arguments import Config, Json, config_path, options, require_alone

app = typer.Typer(no_args_is_help=True, help="Check a configuration; show what can stand in one.")


@app.command("check")
def check(config: Config = None, as_json: Json = False) -> None:
    """Say whether a configuration can be read; asks neither the cluster nor its volumes (`trigpoint check` does).

    Every mistake is named with its line and place. Exit code 2 where there is one.
    """
    path, chosen = config_path(config), options(config)
    if as_json:
        show.print_json({"file": path, "name": chosen.name, "right": True})
        return
    show.facts(
        [
            ("configuration", f"{path} is right"),
            ("name", chosen.name),
            ("databases", ", ".join(chosen.database.databases)),
            ("volumes", ", ".join(f"{volume.name} ({volume.path})" for volume in chosen.volumes)),
            *(
                (f"storage {name}".rstrip(), f"{store.driver} in {store.folder}")
                for name, store in chosen.stores.items()
            ),
            ("catalog", chosen.catalog_path),
            ("journal", f"{chosen.journal.driver} in {chosen.journal_folder}"),
            ("rules", ", ".join(rule.name for rule in chosen.rules) or "none: every commit qualifies"),
        ]
    )


class Format(StrEnum):
    """How the reference is written."""

    MARKDOWN = "markdown"
    MAN = "man"
    TOML = "toml"
    JSON_SHAPES = "json-shapes"
    """Not of the configuration, but of what `--json` prints."""


@app.command("reference")
def show_reference(
    context: typer.Context,
    form: Annotated[
        Format, typer.Option("--format", help="Markdown, a manual page, a commented file; or what --json prints.")
    ] = (Format.MARKDOWN),
    as_json: Json = False,
) -> None:
    """Print every option with type, unit, limits, default and meaning.

    `--format man | man -l -` reads as a manual page; `--format toml` is the file configs/reference.toml.
    """
    from trigger.config import reference

    if as_json:
        require_alone(context, "--json")
        show.print_json(reference.sections())
        return
    if form is Format.JSON_SHAPES:
        from trigger.cli import json_reference

        sys.stdout.write(json_reference.text())
        return
    texts = {
        Format.MARKDOWN: reference.markdown_text,
        Format.MAN: reference.man_text,
        Format.TOML: reference.toml_text,
    }
    sys.stdout.write(texts[form]())
