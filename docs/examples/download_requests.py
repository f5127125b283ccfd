"""A download by requests: python download_requests.py URL FILE."""

import sys
from pathlib import Path

import requests

import libtls
from libtls.http import RequestsAdapter

url, file = sys.argv[1:]

libtls.tls_init()
with requests.Session() as session:
    session.mount("https://", RequestsAdapter())
    with session.get(url, stream=True) as response, Path(file).open("wb") as output:
        response.raise_for_status()
        for piece in response.iter_content(65536):
            output.write(piece)
