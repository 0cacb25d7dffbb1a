"""The P-384 keys of TLS and Flower node as they travel: signing requests and public keys in PEM.

Guarantees: a signing request counts only for exactly the site that it names, by its own key; a public key has
one encoding; every other curve or kind of key is refused with EnrolmentInvalid. Certificates are the
authority's (server/authority.py).
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from cryptography.x509.oid import NameOID

from common.canonical import sha256_hex
from common.errors import EnrolmentInvalid


def make_csr(site: str, key: ec.EllipticCurvePrivateKey) -> str:
    """Ask for a client certificate of a site's TLS key, as PEM."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA384())
    return csr.public_bytes(Encoding.PEM).decode()


def load_csr(pem: str, *, site: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a signing request that names exactly this site and is signed by that key."""
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        names = [attribute.value for attribute in csr.subject]
        key = csr.public_key()
        valid = csr.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentInvalid(f"site {site}: expected a certificate signing request, got {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EnrolmentInvalid(f"site {site}: expected a P-384 TLS key, got another kind")
    if not valid or names != [site] or csr.subject.rdns[0] != _common_name(site):
        raise EnrolmentInvalid(f"site {site}: expected a signing request for CN={site} by its own key")
    return key


def load_node_key(pem: str) -> ec.EllipticCurvePublicKey:
    """Return a Flower node's public key; raises EnrolmentInvalid for anything but P-384."""
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentInvalid(f"node key: expected a public key in PEM, got {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EnrolmentInvalid("node key: expected a P-384 key, got another kind")
    if public_pem(key) != pem:
        raise EnrolmentInvalid("node key: expected its one PEM encoding, got another")
    return key


def public_pem(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def key_sha256(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key's SubjectPublicKeyInfo, in hex."""
    return sha256_hex(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _common_name(site: str) -> x509.RelativeDistinguishedName:
    return x509.RelativeDistinguishedName([x509.NameAttribute(NameOID.COMMON_NAME, site)])
