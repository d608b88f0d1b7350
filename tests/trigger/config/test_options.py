"""Every configuration that is shown can be used, and every wrong one is refused with a message to act on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigger.cli.arguments import options
from trigger.config.options import Options, parse
from trigger.config.reference import Option, man_text, markdown_text, sections, toml, toml_text
from trigger.config.toml_lines import line_of
from trigger.errors import ConfigError

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
BAD_CONFIGS = sorted((ROOT / "tests" / "bad_configs").glob("*.toml"))

SMALLEST = """\
state_folder = "/var/lib/trigpoint"
[database]
conninfo = "host=/var/run/postgresql"
databases = ["bank"]
[[volumes]]
name = "data"
path = "/srv/data"
[storage]
folder = "/srv/snapshots"
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_is_right(path: Path) -> None:
    assert options(path).volumes


def test_examples_show_every_storage_and_journal() -> None:
    assert {path.stem for path in CONFIGS} >= {"reference", "directory", "btrfs", "archive", "members"}


@pytest.mark.parametrize("path", BAD_CONFIGS, ids=lambda path: path.stem)
def test_every_bad_configuration_is_refused_with_its_message(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with pytest.raises(ConfigError) as refused:
        options(Path(path.name))
    assert refused.value.message + "\n" == path.with_suffix(".txt").read_text()


def test_each_message_of_a_bad_configuration_belongs_to_one() -> None:
    assert {path.stem for path in BAD_CONFIGS} == {path.stem for path in (ROOT / "tests/bad_configs").glob("*.txt")}
    assert len(BAD_CONFIGS) >= 50


def test_a_password_is_refused_without_being_shown() -> None:
    for conninfo in (
        "host=db password=canary",
        "host=db PASSWORD = canary",
        "postgresql://me:canary@db/bank",
        "postgres://db/bank?password=canary&user=me",
        "password=canary",
    ):
        with pytest.raises(ConfigError) as refused:
            parse(SMALLEST.replace("host=/var/run/postgresql", conninfo), "x")
        assert "password_file" in refused.value.message
        assert "canary" not in str(refused.value)


@pytest.mark.parametrize(
    "conninfo",
    [
        "host=db sslpassword=canary",
        "sslkey=/k SSLPASSWORD = 'canary'",
        "postgresql://me@db/bank?sslmode=require&sslpassword=canary",
        "postgresql://me@db/bank?sslp%61ssword=canary",
        "postgresql://me@db/bank?p%61ssword=canary",
        "host=db scram_client_key=canary",
        "host=db scram_server_key=canary",
        "host=db oauth_client_secret=canary",
    ],
)
def test_every_secret_of_a_connection_is_refused_without_being_shown(conninfo: str) -> None:
    with pytest.raises(ConfigError, match="must not hold") as refused:
        parse(SMALLEST.replace("host=/var/run/postgresql", conninfo), "x")
    assert "file" in refused.value.message
    assert "canary" not in str(refused.value)


def test_a_password_file_in_the_conninfo_is_no_password() -> None:
    parse(SMALLEST.replace("host=/var/run/postgresql", "host=db passfile=/etc/pgpass"), "x")
    parse(SMALLEST.replace("host=/var/run/postgresql", "postgresql://me@db:5432/bank"), "x")


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        options(tmp_path / "none.toml")
    (tmp_path / "latin1.toml").write_bytes(b'name = "M\xfcnchen"\n')
    with pytest.raises(ConfigError, match="cannot read"):
        options(tmp_path / "latin1.toml")


def test_defaults_stand_where_nothing_is_said() -> None:
    given = parse(SMALLEST, "x")
    assert given.points.max_delay_seconds == 60
    assert given.points.catch_all_seconds == 300
    assert given.rules == []
    assert str(given.catalog_path) == "/var/lib/trigpoint/catalog.sqlite"
    assert str(given.journal_folder) == "/var/lib/trigpoint/journal"
    assert given.storage.keep_free == 1 << 30
    assert [volume.path for volume in given.volume_list] == ["/srv/data"]


def test_what_was_allowed_with_btrfs_once_is_read_there_still_and_shown_to_nobody() -> None:
    assert parse(f'{SMALLEST}driver = "btrfs"\nparanoid = true\n', "x").storage.driver == "btrfs"
    (shown,) = [option for section in sections() for option in section.options if option.key == "storage.paranoid"]
    assert shown.drivers == ("directory",)


@pytest.mark.parametrize(
    ("written", "size"), [("4096", 4096), ('"10GiB"', 10 << 30), ('"1.5 MB"', 1_500_000), ('"0"', 0)]
)
def test_sizes_are_bytes_or_text_with_a_unit(written: str, size: int) -> None:
    assert parse(f"{SMALLEST}keep_free = {written}\n", "x").storage.keep_free == size


@given(st.text(), st.sampled_from(["state_folder", "database.conninfo", "volumes", "storage.folder", "rules"]))
def test_no_text_makes_anything_but_a_configuration_or_a_config_error(text: str, key: str) -> None:
    for document in (text, f"{key} = {text}", f"{SMALLEST}\n{text}"):
        assert isinstance(read(document), Options) or str(read(document)).startswith("wrong.toml")


ANY_VALUE = (
    st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.text(max_size=3), max_size=3)
)


@given(ANY_VALUE, st.sampled_from([option for section in sections() for option in section.options]))
def test_a_value_of_any_kind_in_any_option_is_taken_or_refused_with_its_place(value: object, option: Option) -> None:
    document = re.sub(rf"^#?{option.key.rpartition('.')[2]} = .*$", "", toml_text(), flags=re.MULTILINE)
    section, _, name = option.key.replace("[]", "").rpartition(".")
    header = re.compile(rf"^#?(\[+{section}\]+)$" if section else r"\A", re.MULTILINE)
    document = header.sub(lambda found: f"{found[0].lstrip('#')}\n{name} = {toml(value)}\n", document, count=1)
    answer = read(document)
    assert isinstance(answer, Options) or "wrong.toml:" in str(answer)


def read(document: str) -> Options | ConfigError:
    try:
        return parse(document, "wrong.toml")
    except ConfigError as error:
        return error


# ------------------------------------------------------------------------------------------------ the reference


def test_the_committed_reference_is_what_the_options_say() -> None:
    assert (ROOT / "configs" / "reference.toml").read_text() == toml_text(), "trigpoint config reference --format toml"


def test_every_option_is_in_every_form_of_the_reference() -> None:
    for section in sections():
        for option in section.options:
            assert option.doc.endswith((".", "`")), f"{option.key} is not described in a sentence"
            assert f"`{option.key}`" in markdown_text()
            assert option.key.replace("-", r"\-") in man_text()
            assert f"{option.key.rpartition('.')[2]} = " in toml_text()


def test_the_reference_with_every_example_written_out_is_right() -> None:
    text = re.sub(r"^#(?=\[|[a-z_]+ = )", "", toml_text(), flags=re.MULTILINE)
    text = re.sub(r"^restore_command = .*$", "", text, flags=re.MULTILINE)  # goes with another driver only
    text = re.sub(r"^\[\[storages\]\]\n(?:[^\[].*\n|\n)*", "", text, flags=re.MULTILINE)  # takes the place of [storage]
    several = text.replace("[storage]\n", '[[storages]]\nname = "fast"\n')
    assert parse(several, "reference").stores.keys() == {"fast"}
    written = parse(re.sub(r"^storage = .*$", "", text, flags=re.MULTILINE), "reference")
    assert isinstance(written, Options)
    assert written.rules[0].name == "payments"
    assert written.verify.assertions[0].expect == "1000000"


def test_the_manual_page_has_no_line_that_roff_would_take_for_a_command() -> None:
    known = (".TH", ".SH", ".PP", ".TP", ".br")
    assert all(line.startswith(known) for line in man_text().splitlines() if line.startswith((".", "'")))


# ------------------------------------------------------------------------------------------- places in the file


def test_lines_are_found_through_arrays_strings_and_inline_tables() -> None:
    text = '''\
# [points] in a comment
name = "a # [b] = c"
words = [
  "x = 1",
  "]",
]
long = """
[points]
per_minute = 1
"""
[points]  # really
per_minute = { a = [1, 2], "b" = '}' }
[[rules]]
name = "one"
[[rules]]
"name" = "two"
verify.assertions = 3
'''
    found = {
        ("name",): 2,
        ("words", 1): 3,
        ("long",): 7,
        ("points",): 11,
        ("points", "per_minute", "a"): 12,
        ("rules", 0, "name"): 14,
        ("rules", 1, "name"): 16,
        ("rules", 1, "verify", "assertions", 0): 17,
        ("rules", 1, "nothing"): 15,
        ("elsewhere",): None,
    }
    assert {place: line_of(text, place) for place in found} == found


@given(st.text(alphabet="ab=[]{}\"'#\n .", max_size=60), st.lists(st.sampled_from(["a", "b", 0, 1]), max_size=3))
def test_a_line_is_always_one_of_the_text(text: str, place: list[int | str]) -> None:
    line = line_of(text, tuple(place))
    assert line is None or 1 <= line <= len(text.splitlines())
