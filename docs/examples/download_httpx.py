"""A download by httpx: python download_httpx.py URL FILE."""

import sys
from pathlib import Path

import httpx

import libtls
from libtls.http import httpx_transport

url, file = sys.argv[1:]

libtls.tls_init()
with httpx.Client(transport=httpx_transport()) as client, client.stream("GET", url) as response:
    response.raise_for_status()
    with Path(file).open("wb") as output:
        for piece in response.iter_bytes():
            output.write(piece)
