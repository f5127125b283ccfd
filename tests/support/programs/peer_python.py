"""Python's TLS libraries as peers: ssl (OpenSSL), tlslite-ng, and curl_cffi (BoringSSL; client only).

    peer_python.py ssl|tlslite|boringssl client|server

See tests/support/peer_programs.py for what goes in and out.
"""

import hashlib
import json
import socket
import ssl
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

Job = dict[str, Any]
DEADLINE_S = 20.0


def response(answer: bytes) -> Job:
    """What the table wants of an HTTP response."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return {"error": "", "status": int(head[9:12]), "sha256": hashlib.sha256(body).hexdigest()}


def request(job: Job) -> bytes:
    return f"GET {job['path']} HTTP/1.1\r\nHost: {job['name']}\r\nConnection: close\r\n\r\n".encode()


def connect(job: Job) -> socket.socket:
    return socket.create_connection(("127.0.0.1", job["port"]), DEADLINE_S)


class Ssl:
    """Python's ssl cannot choose suites of TLS 1.3, and takes one group alone."""

    @staticmethod
    def context(job: Job, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if len(job["groups"]) == 1:
            names = {"x25519": "X25519", "secp256r1": "prime256v1"}
            context.set_ecdh_curve(names.get(job["groups"][0], job["groups"][0]))
        if job.get("certificate"):
            context.load_cert_chain(job["certificate"], job["key"])
        return context

    def client(self, job: Job) -> Job:
        context = self.context(job, ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(job["ca"])
        session, result = None, {}
        for _ in range(2 if job["resume"] else 1):
            with connect(job) as plain, context.wrap_socket(plain, server_hostname=job["name"], session=session) as tls:
                tls.sendall(request(job))
                answer = b""
                while piece := tls.recv(65536):  # SSLEOFError without close_notify
                    answer += piece
                session = tls.session
                result = {**response(answer), "suite": tls.cipher()[0], "resumed": tls.session_reused}
        return result

    def server(self, job: Job) -> Any:
        context = self.context(job, ssl.PROTOCOL_TLS_SERVER)
        if job["client_ca"]:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(job["client_ca"])

        def answer(plain: socket.socket) -> None:
            with context.wrap_socket(plain, server_side=True) as tls:
                while data := tls.recv(65536):
                    tls.sendall(data)
                tls.unwrap()

        return answer


class Tlslite:
    """tlslite-ng does not validate chains: it compares the server's certificate with nothing."""

    CIPHERS: ClassVar = {
        "TLS_AES_128_GCM_SHA256": "aes128gcm",
        "TLS_AES_256_GCM_SHA384": "aes256gcm",
        "TLS_CHACHA20_POLY1305_SHA256": "chacha20-poly1305",
    }

    def settings(self, job: Job) -> Any:
        from tlslite.api import HandshakeSettings

        settings = HandshakeSettings()
        settings.minVersion = settings.maxVersion = (3, 4)
        settings.cipherNames = [self.CIPHERS[suite] for suite in job["suites"]]
        settings.eccCurves = list(job["groups"])
        settings.keyShares = [job["groups"][0]]
        settings.dhGroups = []
        settings.certificate_compression_send = []  # it would compress for servers that did not ask for it
        settings.ticketKeys = [bytearray(b"k" * 32)]
        return settings

    @staticmethod
    def identity(job: Job) -> tuple[Any, Any]:
        from tlslite.api import X509CertChain, parsePEMKey

        if not job.get("certificate"):
            return None, None
        chain = X509CertChain()
        chain.parsePemList(Path(job["certificate"]).read_text())
        return chain, parsePEMKey(Path(job["key"]).read_text(), private=True)

    def client(self, job: Job) -> Job:
        from tlslite.api import TLSConnection

        chain, key = self.identity(job)
        session, result = None, {}
        for _ in range(2 if job["resume"] else 1):
            with connect(job) as plain:
                tls = TLSConnection(plain)
                tls.handshakeClientCert(
                    chain, key, session=session, settings=self.settings(job), serverName=job["name"]
                )
                if job["update"]:
                    for _ in tls.send_keyupdate_request(1):
                        pass
                tls.sendall(request(job))
                answer = b""
                while piece := tls.recv(65536):
                    answer += piece
                session = tls.session
                tls.close()
                result = {**response(answer), "resumed": bool(tls.resumed), "suite": ""}
        return result

    def server(self, job: Job) -> Any:
        from tlslite.api import TLSConnection

        chain, key = self.identity(job)

        def answer(plain: socket.socket) -> None:
            tls = TLSConnection(plain)
            tls.handshakeServer(
                certChain=chain, privateKey=key, settings=self.settings(job), reqCert=bool(job["client_ca"])
            )
            if job["client_ca"] and tls.session.clientCertChain is None:
                raise ValueError("no client certificate")
            while data := tls.recv(65536):
                tls.sendall(data)
            tls.close()

        return answer


class BoringSsl:
    """curl_cffi: groups can be chosen, suites cannot."""

    GROUPS: ClassVar = {"x25519": "X25519", "secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}

    def client(self, job: Job) -> Job:
        from curl_cffi import CurlOpt
        from curl_cffi.requests import Session

        options = {
            CurlOpt.RESOLVE: [f"{job['name']}:{job['port']}:127.0.0.1"],
            CurlOpt.SSL_EC_CURVES: ":".join(self.GROUPS.get(group, group) for group in job["groups"]).encode(),
        }
        with Session(impersonate="chrome", verify=job["ca"], curl_options=options) as session:
            answer = session.get(f"https://{job['name']}:{job['port']}{job['path']}", headers={"Connection": "close"})
        digest = hashlib.sha256(answer.content).hexdigest()
        return {"error": "", "status": answer.status_code, "sha256": digest, "suite": "", "resumed": False}


LIBRARIES: dict[str, Any] = {"ssl": Ssl, "tlslite": Tlslite, "boringssl": BoringSsl}


def listen(answer: Any) -> int:
    """A thread that serves one connection after the other; gives its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            plain, _ = listener.accept()
            plain.settimeout(DEADLINE_S)
            try:
                answer(plain)
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            plain.close()

    threading.Thread(target=run, daemon=True).start()
    return int(listener.getsockname()[1])


def main() -> None:
    library = LIBRARIES[sys.argv[1]]()
    results: list[Any] = []
    for job in json.loads(sys.stdin.readline()):
        if sys.argv[2] == "server":
            results.append(listen(library.server(job)))
            continue
        try:
            results.append(library.client(job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(results), flush=True)
    if sys.argv[2] == "server":
        sys.stdin.read()  # until the test closes it


if __name__ == "__main__":
    main()
