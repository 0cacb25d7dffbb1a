"""pacs.toml: the example parses; every unsafe or unknown setting is refused."""

from pathlib import Path

import pytest

from client.pacs.config import EXAMPLE, parse_pacs_config, read_pacs_config
from common.errors import PacsConfigInvalid

LEAST = (
    'directory = "q"\n[listen]\nae_title = "FEDRAD"\nport = 0\nsenders = ["PACS"]\n[fhir]\ndirectory = "f"\n'
)


def test_example_is_a_complete_configuration(tmp_path: Path) -> None:
    (tmp_path / "pacs.toml").write_text(EXAMPLE)
    config = read_pacs_config(tmp_path / "pacs.toml")
    assert config.listen.inbox == tmp_path / "pacs" / "inbox"
    assert config.destination and config.destination.port == 4242 and config.destination.tls is None
    assert config.fhir and config.fhir.directory == tmp_path / "fhir"
    assert config.retry.attempts == 100


def test_least_configuration_listens_on_loopback_only(tmp_path: Path) -> None:
    config = parse_pacs_config(LEAST, folder=tmp_path)
    assert config.listen.address == "127.0.0.1" and config.destination is None
    assert config.retry.delay_s(1) == 5


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("port = 0", "port = 70000"), "port"),
        (("port = 0", "port = true"), "type"),
        (('senders = ["PACS"]', "senders = []"), "sender"),
        (('senders = ["PACS"]', "senders = [1]"), "senders"),
        (('ae_title = "FEDRAD"', 'ae_title = "A VERY LONG AE TITLE"'), "AE title"),
        (('ae_title = "FEDRAD"', 'ae_title = "FED\\\\RAD"'), "AE title"),
        (("port = 0", 'port = 0\naddress = "0.0.0.0"'), "TLS"),
        (("port = 0", 'port = 0\naddress = "nowhere"'), "listen"),
        (("port = 0", 'port = 0\ncertificate = "c.pem"'), "together"),
        (("port = 0", "port = 0\nspeed = 1"), "unknown key"),
        (('directory = "q"', 'directory = "q"\nfinal = true'), "unknown key"),
        (('directory = "q"', ""), "directory"),
        (('directory = "q"', 'directory = "q"\nkeep_days = 0'), "keep_days"),
        (('[fhir]\ndirectory = "f"', ""), "nowhere"),
        (('directory = "f"', 'directory = "f"\nurl = "https://x"'), "either"),
        (('directory = "f"', 'url = "http://fhir.example.org"'), "https"),
        (('directory = "f"', 'url = "ftp://127.0.0.1"'), "https"),
        (("[fhir]", "[retry]\nattempts = 0\n[fhir]"), "retry"),
        (("[fhir]", '[destination]\nae_title = "P"\naddress = "pacs.example"\nport = 104\n[fhir]'), "TLS"),
        (("[fhir]", "[fhir"), "TOML"),
    ],
)
def test_unsafe_or_unknown_setting_is_refused(tmp_path: Path, change: tuple[str, str], word: str) -> None:
    assert change[0] in LEAST
    with pytest.raises(PacsConfigInvalid, match=word):
        parse_pacs_config(LEAST.replace(*change), folder=tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PacsConfigInvalid):
        read_pacs_config(tmp_path / "none.toml")


@pytest.mark.parametrize("held", [b"", b"[", b"\xff", b"unknown = 1"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, held: bytes) -> None:
    path = tmp_path / "pacs.toml"
    path.write_bytes(held)
    with pytest.raises(PacsConfigInvalid, match=r"pacs\.toml: "):
        read_pacs_config(path)
