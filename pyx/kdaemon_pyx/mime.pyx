"""Media types by file name suffix: a table built in Python, read by the engine without Python objects."""

import re

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free

from kdaemon_pyx.http_grammar cimport to_lower
from kdaemon_pyx.http_request cimport Slice

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
MEDIA_TYPE = re.compile(rf"{TOKEN}/{TOKEN}([ \t]*;[ \t]*{TOKEN}=({TOKEN}|\"[ !#-\[\]-~]*\"))*")
TYPES = {
    "text/html": "html htm shtml",
    "text/css": "css",
    "text/xml": "xml",
    "text/plain": "txt text log conf ini toml",
    "text/markdown": "md markdown",
    "text/csv": "csv",
    "text/calendar": "ics",
    "text/vtt": "vtt",
    "text/x-component": "htc",
    "text/javascript": "js mjs",
    "image/gif": "gif",
    "image/jpeg": "jpeg jpg",
    "image/png": "png",
    "image/apng": "apng",
    "image/avif": "avif",
    "image/webp": "webp",
    "image/jxl": "jxl",
    "image/svg+xml": "svg svgz",
    "image/tiff": "tif tiff",
    "image/vnd.microsoft.icon": "ico",
    "image/bmp": "bmp",
    "font/woff": "woff",
    "font/woff2": "woff2",
    "font/ttf": "ttf",
    "font/otf": "otf",
    "font/collection": "ttc",
    "application/vnd.ms-fontobject": "eot",
    "application/json": "json map",
    "application/ld+json": "jsonld",
    "application/manifest+json": "webmanifest",
    "application/geo+json": "geojson",
    "application/atom+xml": "atom",
    "application/rss+xml": "rss",
    "application/xhtml+xml": "xhtml",
    "application/wasm": "wasm",
    "application/pdf": "pdf",
    "application/postscript": "ps eps ai",
    "application/rtf": "rtf",
    "application/yaml": "yaml yml",
    "application/zip": "zip",
    "application/gzip": "gz tgz",
    "application/zstd": "zst",
    "application/x-bzip2": "bz2",
    "application/x-xz": "xz",
    "application/x-7z-compressed": "7z",
    "application/vnd.rar": "rar",
    "application/x-tar": "tar",
    "application/java-archive": "jar war ear",
    "application/epub+zip": "epub",
    "application/msword": "doc",
    "application/vnd.ms-excel": "xls",
    "application/vnd.ms-powerpoint": "ppt",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": "pptx",
    "application/vnd.oasis.opendocument.text": "odt",
    "application/vnd.oasis.opendocument.spreadsheet": "ods",
    "application/vnd.oasis.opendocument.presentation": "odp",
    "application/vnd.debian.binary-package": "deb",
    "application/x-rpm": "rpm",
    "application/x-x509-ca-cert": "pem der crt",
    "application/vnd.apple.mpegurl": "m3u8",
    "application/dash+xml": "mpd",
    "application/sql": "sql",
    "audio/midi": "mid midi kar",
    "audio/mpeg": "mp3",
    "audio/ogg": "ogg oga opus",
    "audio/mp4": "m4a",
    "audio/flac": "flac",
    "audio/aac": "aac",
    "audio/wav": "wav",
    "video/mp4": "mp4 m4v",
    "video/mpeg": "mpeg mpg",
    "video/mp2t": "ts",
    "video/ogg": "ogv",
    "video/webm": "webm",
    "video/quicktime": "mov",
    "video/x-matroska": "mkv",
    "video/x-msvideo": "avi",
    "video/x-flv": "flv",
}


cdef uint32_t hash_suffix(const uint8_t* suffix, uint32_t length) noexcept nogil:
    # FNV-1a over the lower-case bytes.
    cdef uint32_t value = 2166136261u
    cdef uint32_t i
    for i in range(length):
        value = (value ^ to_lower(suffix[i])) * 16777619u
    return value


cdef Slice mime_type(const MimeMap* map, const uint8_t* path, uint32_t length) noexcept nogil:
    cdef uint32_t start = length
    cdef uint32_t n
    cdef uint32_t i
    cdef uint32_t slot
    while start > 0 and path[start - 1] != c'.' and path[start - 1] != c'/':
        start -= 1
    n = length - start
    if start == 0 or path[start - 1] == c'/' or n == 0:
        return map.default_type
    slot = hash_suffix(path + start, n) & map.mask
    while map.slots[slot].suffix.data != NULL:
        if map.slots[slot].suffix.length == n:
            i = 0
            while i < n and to_lower(path[start + i]) == map.slots[slot].suffix.data[i]:
                i += 1
            if i == n:
                return map.slots[slot].type
        slot = (slot + 1) & map.mask
    return map.default_type


cdef class MimeTable:
    """Suffixes and their media types. Immutable once made, so safe to share between threads.

    types: {suffix without dot: media type}, added to the built-in table and winning over it.
    default_type: for names without a known suffix.
    charset: appended to text types that name none ("" for none, as nginx does).
    """

    def __cinit__(self, types=None, str default_type="application/octet-stream", str charset=""):
        cdef uint32_t slots = 64
        cdef uint32_t slot
        cdef bytes suffix_text
        cdef bytes media_type
        merged = {suffix: kind for kind, suffixes in TYPES.items() for suffix in suffixes.split()}
        merged.update({suffix.lower().lstrip("."): kind for suffix, kind in (types or {}).items()})
        for kind in [*merged.values(), default_type]:
            if not MEDIA_TYPE.fullmatch(kind):
                raise ValueError(f"{kind!r} is not a media type: such as text/html, or text/html; charset=utf-8")
        for suffix in types or {}:
            if not suffix.lstrip(".") or "/" in suffix or "." in suffix.lstrip("."):
                raise ValueError(f"suffix {suffix!r}: what is behind the last dot of a name, such as 'html'")
        if charset and not re.fullmatch(TOKEN, charset):
            raise ValueError(f"{charset!r} is not a charset: such as utf-8")
        while slots < 2 * len(merged):
            slots *= 2
        self._texts = []
        self.map.slots = <MimeSlot*>calloc(slots, sizeof(MimeSlot))
        if self.map.slots == NULL:
            raise MemoryError
        self.map.mask = slots - 1
        for name, kind in merged.items():
            if charset and kind.startswith("text/") and "charset=" not in kind:
                kind = f"{kind}; charset={charset}"
            suffix_text = name.encode()
            media_type = kind.encode()
            self._texts += [suffix_text, media_type]
            slot = hash_suffix(suffix_text, <uint32_t>len(suffix_text)) & self.map.mask
            while self.map.slots[slot].suffix.data != NULL:
                slot = (slot + 1) & self.map.mask
            self.map.slots[slot].suffix = self._slice(suffix_text)
            self.map.slots[slot].type = self._slice(media_type)
        media_type = default_type.encode()
        self._texts.append(media_type)
        self.map.default_type = self._slice(media_type)

    cdef Slice _slice(self, bytes text):
        cdef Slice slice
        slice.data = text
        slice.length = <uint32_t>len(text)
        return slice

    def __dealloc__(self):
        free(self.map.slots)

    def lookup(self, bytes path):
        """The media type of ``path``, as bytes."""
        cdef Slice found = mime_type(&self.map, path, <uint32_t>len(path))
        return (<const char*>found.data)[:found.length]
