"""The reference of all options, the service's own and every driver's: Markdown, a manual page, commented TOML."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from trigger.config import drivers
from trigger.config.expressions import FACTS, FUNCTIONS
from trigger.config.options import Options
from trigger.config.sections import Section as SectionOfFile

_NONE = "none"
_MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class Option:
    """One option as the reference shows it."""

    key: str
    """Its name in the file, dotted from the root: `points.cron`, `rules[].name`."""
    type: str
    unit: str
    """`seconds`, `bytes`, or ""."""
    required: bool
    default: Any
    """None where there is no default."""
    limits: str
    example: Any
    doc: str
    chosen_by: str = ""
    """Which option says whether there is such a one: `storage.driver`; "" where it is always there."""
    drivers: tuple[str, ...] = ()
    """What that has to be, one of these."""

    @property
    def usual(self) -> bool:
        """Whether it is there where no driver is named."""
        return not self.drivers or drivers.names(self.chosen_by.partition(".")[0])[0] in self.drivers


@dataclass(frozen=True, slots=True)
class Section:
    """One table of the file."""

    path: str
    """`points`; "" for the root."""
    repeated: bool
    """Whether it stands in double brackets and may be there many times."""
    required: bool
    doc: str
    options: tuple[Option, ...]


def sections() -> list[Section]:
    """Give every section in the order of the file, the root first."""
    return list(_walk(Options, "", repeated=False, required=True, doc=_doc(Options)))


def _walk(model: Any, path: str, *, repeated: bool, required: bool, doc: str) -> Iterator[Section]:
    below: list[tuple[Any, str, bool, bool, str]] = []
    options = []
    docs = _docs(model)
    for name in drivers.keys(model):
        field = model.model_fields[name]
        dotted = f"{path}.{name}".lstrip(".")
        annotation = _without_none(field.annotation)
        inner = get_args(annotation)[0] if get_origin(annotation) is list else annotation
        if hasattr(inner, "model_fields"):
            words = " ".join(part for part in (_doc(inner), docs.get(name)) if part)
            below.append((inner, dotted, inner is not annotation, field.is_required(), words))
        else:
            options.append(
                _option(f"{path}{'[]' if repeated else ''}.{name}".lstrip("."), name, field, docs.get(name, ""))
            )
    yield Section(path, repeated, required, doc, tuple(options))
    for inner, dotted, many, needed, words in below:
        if dotted in drivers.TABLES:
            yield from _brought(dotted)
        else:
            yield from _walk(inner, dotted, repeated=many, required=needed, doc=words)


def _brought(name: str) -> Iterator[Section]:
    """Give the table of that name as all drivers bring it, and what lies below it."""
    table, models = drivers.TABLES[name], drivers.brought(name)
    found: list[tuple[Option, list[str]]] = []
    below: list[Section] = []
    for driver, model in models.items():
        own, *inner = _walk(model, name, repeated=False, required=False, doc="")
        for option in own.options:
            drivers_with = next((having for known, having in found if known == option), None)
            if drivers_with is None:
                found.append((option, drivers_with := []))
            drivers_with.append(driver)
        below += [replace(one, doc=f"{one.doc} Only with {_is_one_of(table.chosen_by, [driver])}.") for one in inner]
    options = [
        option if len(having) == len(models) else replace(option, chosen_by=table.chosen_by, drivers=tuple(having))
        for option, having in found
    ]
    options = [_choice(option, models) if option.key == table.chosen_by else option for option in options]
    needed = any(option.required and option.usual for option in options)
    yield Section(name, repeated=False, required=needed, doc=_doc(table.base), options=tuple(options))
    yield from below


def _choice(option: Option, models: Mapping[str, Any]) -> Option:
    """Give the option by which a driver is chosen, with what each of them is."""
    usual, several = next(iter(models)), len(drivers.names("database")) > 1
    words = [option.doc]
    for name, model in models.items():
        goes_with = f" (with {_is_one_of('database.driver', model.of)})" if several and model.of else ""
        words.append(f"`{name}`{goes_with}: {_doc(model)}")
    choice = " or ".join(map(json.dumps, models))
    return replace(option, type=choice, required=False, default=usual, example=usual, doc=" ".join(words))


def _is_one_of(key: str, names: Iterable[str]) -> str:
    return f"{key} = {' or '.join(map(json.dumps, names))}"


def _doc(model: Any) -> str:
    return " ".join(inspect.cleandoc(model.__doc__ or "").split())


@cache
def _docs(model: Any) -> dict[str, str]:
    """Give the words below each option in the source; read there, so that only who wants them pays for it."""
    docs: dict[str, str] = {}
    for section in reversed([one for one in model.__mro__ if issubclass(one, SectionOfFile)]):
        (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
        assert isinstance(parsed, ast.ClassDef)
        for option, below in pairwise(parsed.body):
            if (
                isinstance(option, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[ast.unparse(option.target)] = " ".join(str(below.value.value).split())
    return docs


def _option(key: str, name: str, field: Any, doc: str) -> Option:
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    annotation = _without_none(field.annotation)
    return Option(
        key=key,
        type=_type(annotation),
        unit="bytes" if _is_bytes(annotation) else "seconds" if name.endswith("_seconds") else "",
        required=field.is_required(),
        default=int(default) if _is_bytes(annotation) and default is not None else default,
        limits=_limits([*field.metadata, *_metadata(annotation)]),
        example=field.examples[0] if field.examples else default,
        doc=doc,
    )


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _metadata(annotation: Any) -> list[Any]:
    """Give the constraints that an `Annotated` type carries, pydantic's `Field` in it unpacked."""
    if get_origin(annotation) is not Annotated:
        return []
    found: list[Any] = []
    for part in get_args(annotation)[1:]:
        found += part.metadata if hasattr(part, "metadata") else [part]
    return found + _metadata(get_args(annotation)[0])


def _is_bytes(annotation: Any) -> bool:
    return getattr(annotation, "__name__", "") == "ByteSize"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(json.dumps(argument) for argument in arguments)
    if origin is list:
        inner = _type(arguments[0])
        return f"list of {inner if ' or ' in inner else inner + 's'}"
    if _is_bytes(annotation):
        return "size"
    names = {str: "text", bool: "true or false", int: "whole number", float: "number", Path: "path"}
    return names.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _limits(metadata: list[Any]) -> str:
    words = []
    for constraint in metadata:
        for name, text in (
            ("gt", "more than {}"),
            ("ge", "at least {}"),
            ("le", "at most {}"),
            ("min_length", "not empty"),
            ("pattern", "matches {}"),
        ):
            value = getattr(constraint, name, None)
            if value is not None:
                words.append(text.format(f"{value:g}" if isinstance(value, int | float) else value))
    return ", ".join(words)


def facts(option: Option) -> str:
    """Give type, unit, limits and default of an option in one line."""
    kind = f"{option.type} in {option.unit}" if option.unit else option.type
    if option.unit == "bytes":
        kind = 'number of bytes, or text such as "10GiB"'
    default = "needed" if option.required else f"default {_NONE if option.default is None else toml(option.default)}"
    only = f"only with {_is_one_of(option.chosen_by, option.drivers)}" if option.drivers else ""
    return "; ".join(part for part in (kind, option.limits, default, only) if part)


def toml(value: Any) -> str:
    """Give `value` as TOML writes it; only the kinds that options have."""
    if isinstance(value, list):
        return f"[{', '.join(toml(item) for item in value)}]"
    if isinstance(value, str | Path):
        return "".join(map(_toml_character, json.dumps(str(value), ensure_ascii=False)))
    return json.dumps(value)


def _toml_character(character: str) -> str:
    """Give a character of a JSON string as TOML has it, which has JSON's escapes and one more for large numbers."""
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 1 << 16 else f"\\U{ord(character):08x}"


def toml_text() -> str:
    """Give the commented reference file: what is needed with an example, all else with its default behind `#`."""
    lines = [
        "# Every option of Trigpoint, made by `trigpoint config reference --format toml`; do not edit.",
        "# What is needed stands here with an example. A line behind a # shows a default, or an example where there",
        "# is none.",
    ]
    for section in sections():
        lines += ["", *_comment(section.doc, "## ")]
        mark = "#" if section.repeated and not section.required else ""
        if section.path:
            lines.append(f"{mark}[[{section.path}]]" if section.repeated else f"{mark}[{section.path}]")
        for option in section.options:
            lines += ["", *_comment(option.doc), *_comment(f"({facts(option)})")]
            name = option.key.rpartition(".")[2]
            stands = option.required and option.usual and not mark
            lines.append(f"{'' if stands else '#'}{name} = {toml(option.example)}")
    return "\n".join(lines) + "\n"


def _comment(text: str, mark: str = "# ") -> list[str]:
    return [mark + line for line in _wrapped(text, 110)]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def markdown_text() -> str:
    """Give the reference in Markdown."""
    lines = ["# trigpoint.toml", "", *_INTRODUCTION, ""]
    for section in sections():
        lines += [f"## {_title(section)}", "", section.doc, ""]
        for option in section.options:
            lines += [f"`{option.key}`", f": {option.doc}  ", f"  *{facts(option)}*", ""]
            if not option.required and option.default is None:
                lines[-1:] = [f"  Example: `{toml(option.example)}`", ""]
    lines += ["## Expressions", "", *_EXPRESSIONS, ""]
    lines += [f"- `{fact}`: {kind}" for fact, kind in FACTS.items()]
    lines += ["", f"Functions: {', '.join(f'`{name}`' for name in sorted(FUNCTIONS))}."]
    return "\n".join(lines).rstrip() + "\n"


_EXPRESSIONS = (
    "`rules[].expression` is written in CEL (Common Expression Language) with its operators, and its macros `has`,",
    "`all`, `exists`, `exists_one`, `filter` and `map`. It must give true or false. An expression that fails for a",
    "commit (a table that is not there, a division by zero) takes it: rather a point too many. The facts:",
)


def man_text() -> str:
    """Give the reference as a manual page (roff, section 5): `trigpoint config reference --format man | man -l -`."""
    lines = ['.TH TRIGPOINT.TOML 5 "" "trigpoint" "Configuration"', ".SH NAME"]
    lines += [r"trigpoint.toml \- configuration of trigpoint", ".SH DESCRIPTION"]
    lines += [_roff(line) if line else ".PP" for line in _INTRODUCTION]
    for section in sections():
        lines += [f'.SH "{_roff(_title(section)).upper()}"', _roff(section.doc)]
        for option in section.options:
            lines += [".TP", rf"\fB{_roff(option.key)}\fR", _roff(option.doc), ".br", rf"\fI{_roff(facts(option))}\fR"]
            if not option.required and option.default is None:
                lines += [".br", f"Example: {_roff(toml(option.example))}"]
    lines += [".SH EXPRESSIONS", *map(_roff, _EXPRESSIONS)]
    for fact, kind in FACTS.items():
        lines += [".TP", rf"\fB{fact}\fR", _roff(kind)]
    lines += [".PP", f"Functions: {', '.join(sorted(FUNCTIONS))}."]
    return "\n".join(lines) + "\n"


_INTRODUCTION = (
    "The configuration is one TOML file for each protected cluster. An unknown key is an error. Trigpoint reads the",
    "file given with `--config`, else the one that `$TRIGPOINT_CONFIG` names, else `./trigpoint.toml`, else",
    "`/etc/trigpoint/trigpoint.toml`. `trigpoint init` writes one for a running cluster, `trigpoint config check`",
    "says whether one is right, and `trigpoint check` whether the cluster and its volumes can be protected so.",
)


def _title(section: Section) -> str:
    if not section.path:
        return "At the top of the file"
    return f"[[{section.path}]]" if section.repeated else f"[{section.path}]"


def _roff(text: str) -> str:
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("`", "")
    return rf"\&{escaped}" if escaped.startswith(".") else escaped
