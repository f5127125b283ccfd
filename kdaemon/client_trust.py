"""Sites that ask their clients for a certificate: whom they believe (RFC 8446, section 4.3.2)."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from kdaemon.site_settings import Site
from kdaemon.tls.certificates import TrustStore
from kdaemon.tls.configuration import ClientAuthentication
from kdaemon.tls.errors import UnknownCertificateAuthority


def load(site: Site) -> ClientAuthentication:
    """What `site.client_ca` and `site.client_certificate` ask for. Raises OSError, ValueError."""
    certificates = x509.load_pem_x509_certificates(Path(site.client_ca).read_bytes())
    trusted = b"".join(sorted(certificate.public_bytes(Encoding.DER) for certificate in certificates))
    return ClientAuthentication(
        TrustStore(certificates).verify_client,
        required=site.client_certificate == "require",
        authorities=tuple(dict.fromkeys(certificate.subject.public_bytes() for certificate in certificates)),
        context=hashlib.sha256(trusted).digest(),
    )


def load_all(sites: Sequence[Site], problem: Callable[[str], None]) -> Mapping[int, ClientAuthentication]:
    """Of those sites that ask, by index. One whose authorities cannot be had lets nobody in: `problem` is told why."""
    asking = {}
    for index, site in enumerate(sites):
        if site.client_ca:
            try:
                asking[index] = load(site)
            except (OSError, ValueError) as error:
                problem(f"{site.client_ca}: {getattr(error, 'strerror', None) or error}; its site lets nobody in")
                asking[index] = ClientAuthentication(_believe_nobody)
    return asking


def _believe_nobody(_chain_der: Sequence[bytes], _now_s: float) -> None:
    raise UnknownCertificateAuthority("the site's authorities could not be read")
