"""A chat over TLS, by asyncio, and its clients in the same program: python chat.py CLIENTS [CAFILE]."""

import asyncio
import sys

import libtls
from libtls import aio

members: set[asyncio.StreamWriter] = set()
JOINING_AT_ONCE = asyncio.Semaphore(50)


async def member(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of the server: what it says, everybody hears."""
    members.add(writer)
    writer.write(b"welcome\n")
    while line := await reader.readline():
        for other in members:
            other.write(line)
    members.discard(writer)
    writer.close()


async def client(name: int, port: int, clients: int, cafile: str | None) -> int:
    """Joins, says hello when it is welcome, and counts what it hears until everybody was heard."""
    async with JOINING_AT_ONCE:
        reader, writer = await aio.open_connection("localhost", port, cafile=cafile)
        await reader.readline()
    await everybody.wait()
    if name % 100 == 0:
        writer.write(b"hello from %d\n" % name)
    heard = {await reader.readline() for _ in range(0, clients, 100)}
    writer.close()
    return len(heard)


everybody = asyncio.Barrier(int(sys.argv[1]))


async def main(clients: int, cafile: str | None = None) -> None:
    libtls.tls_init(operations=4096)
    async with await aio.start_server(member, certificate="localhost") as server:
        heard = await asyncio.gather(*(client(name, server.port, clients, cafile) for name in range(clients)))
    print(f"{clients} clients, each heard {set(heard)} of them")


asyncio.run(main(int(sys.argv[1]), *sys.argv[2:]))
