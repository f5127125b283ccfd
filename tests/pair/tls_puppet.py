"""A peer that says anything: honest messages of the other engine, taken apart, changed, protected again."""

from tls_pair import client_config, make_client, make_server, server_config, server_identity, sign_if_asked

from kdaemon.tls.constants import ContentType, NamedGroup
from kdaemon.tls.errors import TlsError, TlsFault
from kdaemon.tls.key_schedule import traffic_key
from kdaemon.tls.messages import parse_client_hello, serialize_client_hello
from kdaemon.tls.record import RecordReader, RecordWriter

#: Small hellos, one share: what the tests take apart.
PLAIN = {"groups": (NamedGroup.X25519,), "key_share_groups": (NamedGroup.X25519,), "grease": False}


def split_messages(data):
    """Coalesced handshake messages, one by one."""
    messages = []
    while data:
        end = 4 + int.from_bytes(data[1:4], "big")
        messages.append(data[:end])
        data = data[end:]
    return messages


def read_messages(data, suite=None, secret=None):
    """(messages, rest of the bytes) of a flight; protected if a secret is given."""
    reader = RecordReader()
    reader.change_cipher_spec_allowed = True
    if secret is not None:
        reader.set_key(suite, *traffic_key(suite, secret))
    reader.feed(data)
    content = b""
    while (record := reader.next_record()) is not None:
        assert record[0] == ContentType.HANDSHAKE
        content += record[1]
    return split_messages(content)


def writer_with(suite, secret):
    """A writer under a traffic secret."""
    writer = RecordWriter()
    writer.set_key(suite, *traffic_key(suite, secret))
    return writer


def plain_record(message, content_type=ContentType.HANDSHAKE):
    """A record in the clear, of any length, however wrong."""
    return bytes((content_type, 3, 3)) + len(message).to_bytes(2, "big") + message


def client_hello(**options):
    """An honest ClientHello message and its client."""
    client = make_client(client_config(**{**PLAIN, **options}))
    return client.data_to_send()[5:], client


def changed_hello(change, **options):
    """A ClientHello as ``change`` (a function from the parsed form to a new one) leaves it."""
    message, _ = client_hello(**options)
    return serialize_client_hello(change(parse_client_hello(message)))


def with_extension(hello, code, data):
    """The hello with one extension set (in its place, or last), or removed if ``data`` is None."""
    extensions = dict(hello.extensions)
    if data is None:
        extensions.pop(code, None)
    else:
        extensions[code] = data
    return hello._replace(extensions=extensions)


class ServerFlight:
    """An honest server's first flight, taken apart: the hello in the clear, then the protected messages."""

    def __init__(self, client, config=None, identity=None):
        self.server = make_server(config or server_config())
        self.server.receive(client.data_to_send())
        sign_if_asked(self.server, identity or server_identity())
        data = self.server.data_to_send()
        size = 5 + int.from_bytes(data[3:5], "big")
        self.hello = data[5:size]
        rest = data[size:]
        if rest[0] == ContentType.CHANGE_CIPHER_SPEC:
            rest = rest[6:]
        self.suite = self.server._suite
        self.messages = read_messages(rest, self.suite, self.server._server_secret)
        self.writer = writer_with(self.suite, self.server._server_secret)

    def send(self, client, message, content_type=ContentType.HANDSHAKE):
        """One message as a record of its own."""
        client.receive(self.writer.write(content_type, message))


def fault_of(function, *arguments):
    """The fault that a call ends with."""
    try:
        function(*arguments)
    except TlsFault as fault:
        return fault
    except TlsError as error:
        raise AssertionError(f"an alert came instead of a fault: {error}") from error
    raise AssertionError("no fault")
