"""An echo server over TLS, by asyncio: python echo_server.py PORT."""

import asyncio
import sys

import libtls
from libtls import aio


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def main() -> None:
    libtls.tls_init()
    async with await aio.start_server(echo, "127.0.0.1", int(sys.argv[1]), certificate="localhost") as server:
        print(f"listening on port {server.port}", flush=True)
        await server.serve_forever()


asyncio.run(main())
