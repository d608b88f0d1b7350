"""The command line: the list of commands, and what they have in common."""

from __future__ import annotations

import logging
from typing import Annotated

import typer
from typer.main import get_command

from trigger.cli import arguments, catalog, configuration, in_place, log, points, restores, rules, service, setup, show
from trigger.errors import ConfigError

UsageError: type[Exception] = typer.BadParameter.__mro__[2]
"""What Typer raises for a command line that it cannot read; it has `format_message`."""

Abort = typer.Abort
"""What Typer raises where a question is answered with no."""

EXIT_CODES = (
    (0, "done, and everything asked for holds"),
    (1, "failed in another way: a file, the control socket, the machine"),
    (2, "the configuration or the command line is wrong"),
    (3, "the cluster or a volume may not be protected as it is"),
    (4, "the database or its stream of commits did not answer, or refused"),
    (5, "a host did not prove its flush"),
    (6, "a snapshot or a clone was not made"),
    (7, "the catalog cannot be read or written"),
    (8, "the log that a restore must replay is not there, or is damaged"),
    (9, "a target cannot be reached, or a clone failed to come up"),
    (10, "a restored point is not what it should be"),
    (11, "nothing was found"),
    (130, "interrupted"),
)

app = typer.Typer(
    name="trigpoint",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes:\n\n" + "\n".join(f"- {code}: {meaning}" for code, meaning in EXIT_CODES),
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version  # which takes as long to load as all of Typer

        try:
            typer.echo(f"trigpoint {version('trigpoint')}")
        except PackageNotFoundError:
            typer.echo("trigpoint, not installed")
        raise typer.Exit


@app.callback()
def root(
    config: arguments.Config = None,
    _asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A recovery point for every database transaction that matters, and back to exactly that commit."""
    arguments.before_command.set(config)
    if logging.lastResort is not None:  # what is logged where nobody asked for a log goes to the terminal
        logging.lastResort.setFormatter(show.LogLines())


_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("demo", add_help_option=False, context_settings=_PASSED_ON)
def demo(context: typer.Context) -> None:
    """Show it: a bank on a PostgreSQL of its own, an accident, and back to the commit right before it, proven."""
    try:
        from trigger.cli.demo import demo as play  # it needs the extra `demo`, and time to load
    except ImportError as error:
        raise ConfigError(f"the demo needs the package {error.name}", hint="pip install 'trigpoint[demo]'") from error
    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    inner.command()(play)
    code = inner(args=context.args, prog_name="trigpoint demo", standalone_mode=False)
    if isinstance(code, int):
        raise typer.Exit(code)


app.command("init")(setup.init)
app.command("check")(setup.check)
app.command("explain")(setup.explain)
app.command("run")(service.run)
app.command("point")(service.point)
app.command("expire")(service.expire)
app.command("status")(service.status)
app.command("list")(points.list_points)
app.command("show")(points.show_point)
app.command("find")(points.find)
app.command("commits")(log.commits)
app.command("restore")(restores.restore_state)
app.add_typer(restores.clones, name="clones")
app.add_typer(in_place.aside, name="aside")
app.command("verify")(restores.verify_point)
app.command("reconcile")(service.reconcile)
app.command("clear")(service.clear)
app.command("release")(service.release)
app.add_typer(catalog.app, name="catalog")
app.add_typer(rules.app, name="rules")
app.add_typer(configuration.app, name="config")

program = get_command(app)
"""What runs the command line: the options of all commands as they were read from their functions, once."""
