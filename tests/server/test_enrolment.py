"""The operator's registry: approve, renew, rotate, revoke, each in the ledger, none touching another site."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.certificates import Authority
from common.ec_keys import make_csr
from common.enrolment import (
    PresentKeys,
    enrolment_body,
    fingerprint_of,
)
from common.errors import (
    CertificateInvalid,
    ConsortiumInvalid,
    EnrolmentInvalid,
    FingerprintMismatch,
    SiteNotEnrolled,
    SiteRevoked,
)
from common.ledger.audit import verify_bundle
from common.ledger.checkpoint import log_key
from common.ledger.entries import RevocationReason
from common.ledger.export import export_bundle
from common.ledger.findings import Status
from server.authority import (
    create_authority,
    open_authority,
    read_certificate,
    renew_after,
    verify_issued,
)
from server.consortium import ServerHome, create_server_home, open_server_home, renew_server_certificate
from server.enrolment import SiteState, approve, approved_site, read_sites, renew, revoke, rotate
from tests.common.test_enrolment import Keys

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture()
def home(tmp_path: Path) -> ServerHome:
    return create_server_home(tmp_path / "srv", consortium="lab", address="localhost:8443", now=NOW)


@pytest.fixture()
def authority(home: ServerHome) -> Authority:
    return home.authority()


def enter(home: ServerHome, site: str, keys: Keys | None = None, *, now: datetime = NOW) -> Keys:
    keys = keys or Keys()
    request = keys.request(site)
    approve(home, home.authority(), request, fingerprint=fingerprint_of(request.keys), now=now)
    return keys


def audit(home: ServerHome) -> dict[str, Status]:
    key = log_key(home.log_origin, bytes.fromhex(home.message_key().public))
    bundle = export_bundle(
        home.ledger, log=key, exported_s=int(NOW.timestamp()), software="fedrad 0.1.0", releases={},
        records=None, retained=None, leave_out=frozenset(),
    )  # fmt: skip
    return {f.control: f.status for f in verify_bundle(bundle, trusted=key).findings}


def test_a_consortium_is_made_once_and_its_keys_are_private(home: ServerHome) -> None:
    for path in (
        home.key_path,
        home.superexec_secret,
        home.certificate_key,
        home.authority_directory / "ca.key",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700, path
    with pytest.raises(ConsortiumInvalid, match="no consortium here yet"):
        create_server_home(home.directory, consortium="lab", address="localhost:8443", now=NOW)
    assert open_server_home(home.directory) == home


@pytest.mark.parametrize(
    ("consortium", "address"), [("Lab", "a:1"), ("lab", "a"), ("lab", "a:0"), ("lab", "a b:1"), ("", "a:1")]
)
def test_a_consortium_with_a_wrong_name_or_address_is_refused(
    tmp_path: Path, consortium: str, address: str
) -> None:
    with pytest.raises(ConsortiumInvalid):
        create_server_home(tmp_path / "srv", consortium=consortium, address=address, now=NOW)


@pytest.mark.parametrize("text", ["certificate_days = 0", "unknown = 1", "studies_at_once = 1.5", "["])
def test_a_wrong_policy_is_refused_by_name(home: ServerHome, text: str) -> None:
    (home.directory / "policy.toml").write_text(text)
    with pytest.raises(ConsortiumInvalid, match=r"policy\.toml"):
        open_server_home(home.directory)


def test_damaged_settings_do_not_ask_for_a_new_consortium(home: ServerHome) -> None:
    (home.directory / "server.json").write_bytes(b"{torn")
    with pytest.raises(ConsortiumInvalid, match="restore it from a backup"):
        open_server_home(home.directory)
    (home.directory / "server.json").unlink()
    with pytest.raises(ConsortiumInvalid, match="run `fedrad-server init`"):
        open_server_home(home.directory)


def test_the_authority_opens_only_with_its_passphrase(tmp_path: Path) -> None:
    create_authority(tmp_path, consortium="lab", now=NOW, passphrase=b"a long one")
    with pytest.raises(CertificateInvalid):
        open_authority(tmp_path)
    with pytest.raises(CertificateInvalid):
        open_authority(tmp_path, passphrase=b"another")
    assert open_authority(tmp_path, passphrase=b"a long one").certificate
    with pytest.raises(CertificateInvalid, match="never replaced"):
        create_authority(tmp_path, consortium="lab", now=NOW)


def test_the_passphrase_may_come_from_systemd(tmp_path: Path) -> None:
    create_server_home(
        tmp_path / "srv", consortium="lab", address="localhost:8443", now=NOW, passphrase=b"secret"
    )
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "fedrad-ca.passphrase").write_text("secret\n")
    home = open_server_home(tmp_path / "srv", credentials=tmp_path / "credentials")
    assert home.authority().certificate


def test_an_authority_key_that_others_can_read_is_refused(home: ServerHome) -> None:
    (home.authority_directory / "ca.key").chmod(0o644)
    with pytest.raises(CertificateInvalid, match="0600"):
        home.authority()


def test_a_certificate_names_one_site_for_a_week_and_serves_clients_only(
    home: ServerHome, authority: Authority
) -> None:
    request = Keys().request("north")
    signed = approve(home, authority, request, fingerprint=fingerprint_of(request.keys), now=NOW)
    certificate = x509.load_pem_x509_certificate(signed.bundle.certificate.encode())
    verify_issued(certificate, authority.certificate)
    assert certificate.subject.rfc4514_string() == "CN=north"
    assert certificate.not_valid_after_utc == NOW + timedelta(days=7)
    assert certificate.not_valid_before_utc == NOW - timedelta(hours=1)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert renew_after(certificate) == NOW + timedelta(days=7) * 2 / 3
    assert not set(read_sites(home)["north"].certificates[0].serial) - set("0123456789abcdef")


def test_a_site_with_another_fingerprint_is_refused(home: ServerHome, authority: Authority) -> None:
    request, heard = Keys().request("north"), Keys().request("north")
    with pytest.raises(FingerprintMismatch):
        approve(home, authority, request, fingerprint=fingerprint_of(heard.keys), now=NOW)
    assert read_sites(home) == {}
    assert not home.ledger.exists()


def test_an_enrolled_site_is_not_replaced_by_approve(home: ServerHome, authority: Authority) -> None:
    keys = enter(home, "north")
    before = (home.sites / "north.json").read_bytes()
    other = Keys().request("north")
    with pytest.raises(EnrolmentInvalid, match="rotate"):
        approve(home, authority, other, fingerprint=fingerprint_of(other.keys), now=NOW)
    assert (home.sites / "north.json").read_bytes() == before
    enter(home, "north", keys)  # the same request again: another certificate, nothing else
    assert len(read_sites(home)["north"].certificates) == 2


def test_a_key_of_another_site_is_refused(home: ServerHome, authority: Authority) -> None:
    keys = enter(home, "north")
    for shared in ("tls", "node", "message", "witness"):
        copy = Keys(**{shared: getattr(keys, shared)}).request("south")
        with pytest.raises(EnrolmentInvalid, match="one of site north"):
            approve(home, authority, copy, fingerprint=fingerprint_of(copy.keys), now=NOW)


def test_one_sites_steps_touch_no_other(home: ServerHome, authority: Authority) -> None:
    enter(home, "north")
    south = enter(home, "south")
    before = (home.sites / "north.json").read_bytes()
    renew(home, authority, "south", make_csr("south", south.tls), now=NOW)
    present = PresentKeys(south.message, read_sites(home)["south"].enrolled)
    request = Keys(message=south.message, witness=south.witness).request("south", before=present)
    rotate(home, authority, request, fingerprint=fingerprint_of(request.keys), now=NOW)
    revoke(home, authority, "south", reason=RevocationReason.LEFT, now=NOW)
    enter(home, "south")
    assert (home.sites / "north.json").read_bytes() == before


def test_renewal_is_for_the_registered_key_only(home: ServerHome, authority: Authority) -> None:
    keys = enter(home, "north")
    later = NOW + timedelta(days=5)
    signed = renew(home, authority, "north", make_csr("north", keys.tls), now=later)
    certificate = x509.load_pem_x509_certificate(signed.bundle.certificate.encode())
    assert certificate.not_valid_after_utc == later + timedelta(days=7)
    with pytest.raises(EnrolmentInvalid, match="rotation"):
        renew(home, authority, "north", make_csr("north", Keys().tls), now=later)
    with pytest.raises(SiteNotEnrolled):
        renew(home, authority, "south", make_csr("south", keys.tls), now=later)


def test_a_site_that_slept_for_weeks_renews_and_for_months_does_not(
    home: ServerHome, authority: Authority
) -> None:
    keys = enter(home, "north")
    csr = make_csr("north", keys.tls)
    with pytest.raises(CertificateInvalid, match="approve the site anew"):
        renew(home, authority, "north", csr, now=NOW + timedelta(days=60))
    renew(home, authority, "north", csr, now=NOW + timedelta(days=30))


def test_renewal_in_a_loop_ends_before_the_revocation_list_overflows(
    home: ServerHome, authority: Authority
) -> None:
    keys = enter(home, "north")
    csr = make_csr("north", keys.tls)
    with pytest.raises(CertificateInvalid, match="in a loop"):
        for _ in range(80):
            renew(home, authority, "north", csr, now=NOW)
    assert len(read_sites(home)["north"].certificates) == 60
    revoke(home, authority, "north", reason=RevocationReason.LEFT, now=NOW)
    assert len(x509.load_pem_x509_crl(home.crl.read_bytes())) == 60


def test_certificates_that_ended_leave_the_registry(home: ServerHome, authority: Authority) -> None:
    keys = enter(home, "north")
    for weeks in range(1, 5):
        renew(home, authority, "north", make_csr("north", keys.tls), now=NOW + timedelta(days=9 * weeks))
    assert len(read_sites(home)["north"].certificates) == 2


def test_a_revoked_site_gets_nothing_and_is_on_the_list(home: ServerHome, authority: Authority) -> None:
    keys = enter(home, "north")
    serial = int(read_sites(home)["north"].certificates[0].serial, 16)
    revoked = revoke(home, authority, "north", reason=RevocationReason.COMPROMISED, now=NOW)
    assert revoked.state is SiteState.REVOKED and revoked.not_after_s == 0
    crl = x509.load_pem_x509_crl(home.crl.read_bytes())
    assert crl.get_revoked_certificate_by_serial_number(serial) is not None
    assert crl.is_signature_valid(authority.certificate.public_key())  # type: ignore[arg-type]
    with pytest.raises(SiteRevoked, match="compromised"):
        renew(home, authority, "north", make_csr("north", keys.tls), now=NOW)
    with pytest.raises(SiteRevoked):
        approved_site(home, "north")
    assert revoke(home, authority, "north", reason=RevocationReason.LEFT, now=NOW) == revoked


def test_revoked_keys_never_come_back(home: ServerHome, authority: Authority) -> None:
    """Also because Flower never takes a node key twice."""
    keys = enter(home, "north")
    revoke(home, authority, "north", reason=RevocationReason.LEFT, now=NOW)
    for name in ("tls", "node", "message", "witness"):
        request = Keys(**{name: getattr(keys, name)}).request("north")
        with pytest.raises(EnrolmentInvalid, match="--new-keys"):
            approve(home, authority, request, fingerprint=fingerprint_of(request.keys), now=NOW)
    enter(home, "north")
    assert read_sites(home)["north"].state is SiteState.APPROVED


def test_rotation_ends_the_old_certificate_and_needs_the_old_key(
    home: ServerHome, authority: Authority
) -> None:
    keys = enter(home, "north")
    old_serial = read_sites(home)["north"].certificates[0].serial
    thief = Keys()
    stolen = thief.request("north", before=PresentKeys(thief.message, enrolment_body(keys.request().keys)))
    with pytest.raises(EnrolmentInvalid, match="present message key"):
        rotate(home, authority, stolen, fingerprint=fingerprint_of(stolen.keys), now=NOW)
    present = PresentKeys(keys.message, read_sites(home)["north"].enrolled)
    request = Keys().request("north", before=present)
    rotate(home, authority, request, fingerprint=fingerprint_of(request.keys), now=NOW)
    after = read_sites(home)["north"]
    assert after.enrolled == enrolment_body(request.keys)
    crl = x509.load_pem_x509_crl(home.crl.read_bytes())
    assert [f"{entry.serial_number:x}" for entry in crl] == [old_serial]


def test_the_ledger_of_every_step_passes_the_audit(home: ServerHome, authority: Authority) -> None:
    north = enter(home, "north")
    enter(home, "south")
    present = PresentKeys(north.message, read_sites(home)["north"].enrolled)
    request = Keys().request("north", before=present)
    rotate(home, authority, request, fingerprint=fingerprint_of(request.keys), now=NOW)
    revoke(home, authority, "south", reason=RevocationReason.LEFT, now=NOW)
    enter(home, "south")
    findings = audit(home)
    assert findings["entry-signatures"] is Status.PASS
    assert findings["log-history"] is Status.PASS
    assert not [name for name, status in findings.items() if status is Status.FAIL]


def test_the_server_renews_its_own_certificate_in_time(home: ServerHome, authority: Authority) -> None:
    assert not renew_server_certificate(home, authority, now=NOW + timedelta(days=4))
    assert renew_server_certificate(home, authority, now=NOW + timedelta(days=5))
    certificate = read_certificate(home.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert certificate.not_valid_after_utc == NOW + timedelta(days=12)
