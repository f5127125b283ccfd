"""Listings of directories: names, sizes and times, directories first, as HTML and as JSON."""

from libc.errno cimport ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memcpy, memset, strlen
from posix.stat cimport S_ISDIR, S_ISLNK, S_ISREG
from posix.unistd cimport close

from kdaemon_pyx.beneath cimport openat_beneath
from kdaemon_pyx.http_grammar cimport equals_ignoring_case, is_token_byte, parse_weight, skip_blanks, utf8_length
from kdaemon_pyx.http_request cimport PATH_BYTES_MAX, Slice
from kdaemon_pyx.http_response cimport HTTP_DATE_BYTES, Writer, format_http_date, put_decimal, put_encoded_path
from kdaemon_pyx.representation cimport file_stat

cdef extern from "<dirent.h>" nogil:
    ctypedef struct DIR:
        pass
    struct dirent:
        char d_name[256]
    DIR* fdopendir(int fd)
    dirent* readdir(DIR* directory)
    int closedir(DIR* directory)
    int dirfd(DIR* directory)

cdef extern from "<sys/stat.h>" nogil:
    int fstat(int fd, file_stat* status)
    int fstatat(int fd, const char* name, file_stat* status, int flags)

cdef extern from "<fcntl.h>" nogil:
    const int AT_SYMLINK_NOFOLLOW
    const int O_PATH

cdef extern from "<strings.h>" nogil:
    int strcasecmp(const char* a, const char* b)

cdef extern from "<string.h>" nogil:
    int strcmp(const char* a, const char* b)

cdef struct Name:
    int64_t size                   # -1: a directory
    int64_t mtime_s
    uint8_t directory
    char name[256]

cdef struct Text:
    uint8_t* data
    uint64_t length
    uint64_t capacity
    bint failed

cdef const char* PAGE_START = b"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --line: #8883; --dim: #666; --link: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --dim: #aaa; --link: #a8c7fa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere; }
h1 a { color: inherit; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 400; font-size: .85rem; }
td, th { padding: .35rem 0 .35rem 1.5rem; border-bottom: 1px solid var(--line); vertical-align: baseline; }
td:first-child, th:first-child { width: 100%; padding-left: 0; overflow-wrap: anywhere; }
td + td, th, p { color: var(--dim); }
td + td, th + th { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
.d a { font-weight: 600; }
tr:hover td { background: #8881; }
p { font-size: .85rem; }
@media (max-width: 36rem) { td:last-child, th:last-child { display: none; } }
</style>
<title>"""
cdef const char* UNITS = b"kMGTPE"


cdef void add(Text* text, const void* data, uint64_t length) noexcept nogil:
    cdef uint64_t capacity = text.capacity
    cdef uint8_t* grown
    if text.failed:
        return
    if text.length + length > capacity:
        while capacity < text.length + length:
            capacity = 2 * capacity + 4096
        grown = <uint8_t*>realloc(text.data, capacity)
        if grown == NULL:
            text.failed = True
            return
        text.data = grown
        text.capacity = capacity
    memcpy(text.data + text.length, data, length)
    text.length += length


cdef void add_text(Text* text, const char* data) noexcept nogil:
    add(text, data, strlen(data))


cdef void add_number(Text* text, uint64_t value) noexcept nogil:
    cdef uint8_t[24] buffer
    cdef Writer writer
    writer.position = buffer
    writer.end = buffer + sizeof(buffer)
    writer.overflow = False
    put_decimal(&writer, value)
    add(text, buffer, writer.position - buffer)


cdef void add_reference(Text* text, const char* name, bint directory) noexcept nogil:
    # "./" so that a name with a colon is not read as a scheme.
    cdef uint8_t[800] buffer
    cdef Writer writer
    writer.position = buffer
    writer.end = buffer + sizeof(buffer)
    writer.overflow = False
    put_encoded_path(&writer, <const uint8_t*>name, <uint32_t>strlen(name))
    add(text, b"./", 2)
    add(text, buffer, writer.position - buffer)
    if directory:
        add(text, b"/", 1)


cdef void add_html(Text* text, const char* data, uint64_t length) noexcept nogil:
    cdef uint64_t i
    for i in range(length):
        if data[i] == c'<':
            add(text, b"&lt;", 4)
        elif data[i] == c'>':
            add(text, b"&gt;", 4)
        elif data[i] == c'&':
            add(text, b"&amp;", 5)
        elif data[i] == c'"':
            add(text, b"&quot;", 6)
        else:
            add(text, &data[i], 1)


cdef void add_way(Text* text, const char* path, uint32_t length) noexcept nogil:
    # The path with a link to each folder on the way.
    cdef uint32_t start = 0
    cdef uint32_t end
    cdef uint32_t i
    while start < length:
        end = start
        while path[end] != c'/':                           # it is the last byte
            end += 1
        end += 1
        if end < length:
            add_text(text, b'<a href="')
            for i in range(end, length):
                if path[i] == c'/':
                    add(text, b"../", 3)
            add_text(text, b'">')
        add_html(text, path + start, end - start)
        if end < length:
            add_text(text, b"</a>")
        start = end


cdef void add_json(Text* text, const char* name) noexcept nogil:
    # A JSON string; bytes that are not UTF-8 become U+FFFD.
    cdef const uint8_t* data = <const uint8_t*>name
    cdef const char* digits = b"0123456789abcdef"
    cdef char[6] escaped
    cdef uint32_t n
    add(text, b'"', 1)
    while data[0] != 0:
        n = utf8_length(data, 4)                           # a NUL is at the end
        if n == 0:
            add(text, b"\xef\xbf\xbd", 3)
            n = 1
        elif data[0] < 0x20:
            memcpy(escaped, b"\\u00", 4)
            escaped[4] = digits[data[0] >> 4]
            escaped[5] = digits[data[0] & 15]
            add(text, escaped, 6)
        elif data[0] == c'"' or data[0] == c'\\':
            add(text, b"\\", 1)
            add(text, data, 1)
        else:
            add(text, data, n)
        data += n
    add(text, b'"', 1)


cdef void add_size(Text* text, uint64_t size) noexcept nogil:
    cdef uint64_t tenths = size * 10
    cdef int unit = -1
    if size < 1000:
        add_number(text, size)
        add(text, b" B", 2)
        return
    if size > <uint64_t>1 << 60:
        tenths = <uint64_t>10 << 60
    while tenths >= 10000:
        tenths //= 1000
        unit += 1
    add_number(text, tenths // 10)
    if tenths < 100:
        add(text, b".", 1)
        add_number(text, tenths % 10)
    add(text, b" ", 1)
    if unit >= 0:
        add(text, &UNITS[unit], 1)
    add(text, b"B", 1)


cdef void add_html_row(Text* text, const Name* name) noexcept nogil:
    cdef uint8_t[HTTP_DATE_BYTES] date
    add_text(text, b'<tr class="d"><td><a href="' if name.directory else b'<tr><td><a href="')
    add_reference(text, name.name, name.directory)
    add_text(text, b'">')
    add_html(text, name.name, strlen(name.name))
    if name.directory:
        add(text, b"/", 1)
    add_text(text, b"</a></td><td>")
    if name.size >= 0:
        add_size(text, <uint64_t>name.size)
    add_text(text, b"</td><td>")
    format_http_date(name.mtime_s, date)
    add(text, date + 5, 17)                                # "06 Nov 1994 08:49"
    add_text(text, b"</td></tr>\n")


cdef void add_json_row(Text* text, const Name* name) noexcept nogil:
    cdef uint8_t[HTTP_DATE_BYTES] date
    add_text(text, b'{"name":')
    add_json(text, name.name)
    add_text(text, b',"type":"directory","mtime":"' if name.directory else b',"type":"file","mtime":"')
    format_http_date(name.mtime_s, date)
    add(text, date, HTTP_DATE_BYTES)
    add(text, b'"', 1)
    if name.size >= 0:
        add_text(text, b',"size":')
        add_number(text, <uint64_t>name.size)
    add(text, b"}", 1)


cdef int compare_names(const void* left, const void* right) noexcept nogil:
    cdef const Name* a = <const Name*>left
    cdef const Name* b = <const Name*>right
    cdef int order
    if a.directory != b.directory:
        return -1 if a.directory else 1
    order = strcasecmp(a.name, b.name)
    return order if order != 0 else strcmp(a.name, b.name)


cdef bint follow_link(int root_fd, const char* target, file_stat* status) noexcept nogil:
    cdef int fd = openat_beneath(root_fd, <const uint8_t*>target, O_PATH)
    cdef bint found
    if fd < 0:
        return False
    found = fstat(fd, status) == 0
    close(fd)
    return found


cdef int read_names(
    DIR* directory, int root_fd, const uint8_t* path, uint32_t length, bint dotfiles, Name* names, bint* more
) noexcept nogil:
    cdef dirent* found
    cdef file_stat status
    cdef char[PATH_BYTES_MAX + 256] target
    cdef uint64_t name_length
    cdef int count = 0
    more[0] = False
    memcpy(target, path, length)
    while True:
        found = readdir(directory)
        if found == NULL:
            return count
        if found.d_name[0] == c'.' and (not dotfiles or found.d_name[1] == 0 or strcmp(found.d_name, b"..") == 0):
            continue
        if fstatat(dirfd(directory), found.d_name, &status, AT_SYMLINK_NOFOLLOW) != 0:
            continue
        name_length = strlen(found.d_name)
        if S_ISLNK(status.st_mode):
            memcpy(target + length, found.d_name, name_length + 1)
            if not follow_link(root_fd, target, &status):
                continue
        if not (S_ISREG(status.st_mode) or S_ISDIR(status.st_mode)):
            continue
        if count == LISTING_NAMES_MAX:
            more[0] = True
            return count
        names[count].directory = S_ISDIR(status.st_mode)
        names[count].size = status.st_size if S_ISREG(status.st_mode) else -1
        names[count].mtime_s = status.st_mtim.tv_sec
        memcpy(names[count].name, found.d_name, name_length + 1)
        count += 1


cdef int make_listing(
    int fd, int root_fd, const uint8_t* path, uint32_t length, bint dotfiles, Listing* listing
) noexcept nogil:
    cdef DIR* directory = fdopendir(fd)
    cdef Name* names
    cdef Text html
    cdef Text json
    cdef int count
    cdef int i
    cdef bint more
    memset(listing, 0, sizeof(Listing))
    if directory == NULL:
        i = -errno
        close(fd)
        return i
    names = <Name*>malloc(LISTING_NAMES_MAX * sizeof(Name))
    if names == NULL:
        closedir(directory)
        return -ENOMEM
    count = read_names(directory, root_fd, path, length, dotfiles, names, &more)
    closedir(directory)
    qsort(names, count, sizeof(Name), compare_names)
    memset(&html, 0, sizeof(html))
    memset(&json, 0, sizeof(json))
    add_text(&html, PAGE_START)
    add_html(&html, <const char*>path, length)
    add_text(&html, b"</title>\n<h1>")
    add_way(&html, <const char*>path, length)
    add_text(&html, b"</h1>\n<table>\n<tr><th>Name</th><th>Size</th><th>Modified (UTC)</th></tr>\n")
    if length > 1:
        add_text(&html, b'<tr class="d"><td><a href="../">../</a></td><td></td><td></td></tr>\n')
    add(&json, b"[\n", 2)
    for i in range(count):
        add_html_row(&html, &names[i])
        if i > 0:
            add(&json, b",\n", 2)
        add_json_row(&json, &names[i])
    add(&json, b"\n]\n", 3)
    add_text(&html, b"</table>\n")
    if count == 0:
        add_text(&html, b"<p>This folder is empty.\n")
    if more:
        add_text(&html, b"<p>There is more here than is listed.\n")
    free(names)
    if html.failed or json.failed:
        free(html.data)
        free(json.data)
        return -ENOMEM
    listing.text[<int>LISTING_HTML] = html.data
    listing.length[<int>LISTING_HTML] = html.length
    listing.text[<int>LISTING_JSON] = json.data
    listing.length[<int>LISTING_JSON] = json.length
    return 0


cdef ListingFormat preferred_format(Slice accept) noexcept nogil:
    cdef int html = 0
    cdef int json = 0
    cdef int weight
    cdef uint32_t i = 0
    cdef uint32_t start
    cdef uint32_t end
    while i < accept.length:
        i = skip_blanks(accept.data, accept.length, i)
        start = i
        while i < accept.length and (is_token_byte(accept.data[i]) or accept.data[i] == c'/'):
            i += 1
        end = i
        weight = parse_weight(accept.data, accept.length, &i)
        if equals_ignoring_case(accept.data + start, end - start, b"text/html", 9):
            html = weight
        elif equals_ignoring_case(accept.data + start, end - start, b"application/json", 16):
            json = weight if weight > html else 0          # among equals what is named first
        while i < accept.length and accept.data[i] != c',':
            i += 1
        i += 1
    return LISTING_JSON if json > 0 and json >= html else LISTING_HTML
