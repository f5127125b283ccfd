"""Answers: what a request gets, and how its response is put into the connection's output."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from kdaemon_pyx.core cimport CLOSE_RESOURCES
from kdaemon_pyx.files cimport ENCODING_IDENTITY, Entry, file_table_distrust, file_table_lookup
from kdaemon_pyx.http_address cimport address_may_ask
from kdaemon_pyx.http_body cimport BODY_NONE, BodyDiscard, begin_body
from kdaemon_pyx.http_conditional cimport ByteRange, evaluate_preconditions, select_ranges
from kdaemon_pyx.http_encoding cimport select_encoding
from kdaemon_pyx.http_head cimport (
    END_BOUNDARY_BYTES, HEAD_EXTRA_BYTES_MAX, PART_HEAD_BYTES_MAX, multipart_length, put_end_boundary, put_not_modified_head,
    put_part_head, put_ranges_head, put_whole_head,
)
from kdaemon_pyx.http_log cimport log_response
from kdaemon_pyx.http_request cimport METHOD_HEAD, METHOD_OPTIONS, METHOD_OTHER, HttpRequest, Slice, parse_request_head
from kdaemon_pyx.http_response cimport (
    GENERATED_BYTES_MAX, HTTP_DATE_BYTES, Writer, put, put_decimal, put_encoded_path, put_end_of_head, put_error,
    put_slice, put_status_line, put_text, refresh_date,
)
from kdaemon_pyx.http_session cimport HttpContext, HttpSession
from kdaemon_pyx.http_site cimport (
    LINES_MAX, RedirectRuleC, SiteC, error_page, find_redirect, matching_lines, site_answers_for,
)
from kdaemon_pyx.listing cimport preferred_format
from kdaemon_pyx.representation cimport (
    Representation, representation_is_current, representation_load, representation_map, representation_release,
    representation_retain, representation_validators,
)


cdef bint open_writer(HttpSession* session, Writer* writer, uint32_t room) noexcept nogil:
    # 64 bytes more than asked: the Connection field and a 100 Continue.
    writer.position = session.context.transport.reserve(session.connection, room + 64)
    writer.end = writer.position + room + 64
    writer.overflow = False
    return writer.position != NULL


cdef void commit_writer(
    HttpSession* session, Writer* writer, uint8_t* start, int status, uint64_t body_bytes
) noexcept nogil:
    # Every response passes here once, with its head.
    cdef HttpContext* context = session.context
    context.transport.commit(session.connection, <uint32_t>(writer.position - start))
    context.responses[status // 100] += 1
    context.transport.count_request(session.connection)
    if context.log != NULL:
        log_response(context.log, &context.date, &session.peer, &context.request, status, body_bytes)


cdef void put_lines(HttpSession* session, Writer* writer) noexcept nogil:
    # The site's header fields for the path of the request under way.
    cdef Slice[LINES_MAX] lines
    cdef uint32_t count
    cdef uint32_t i
    cdef HttpContext* context = session.context
    count = matching_lines(
        &context.sites[session.site], context.path, context.request.path_length, lines)
    for i in range(count):
        put_slice(writer, lines[i])


cdef bint answer_status(HttpSession* session, int status) noexcept nogil:
    # A generated response: an error, or the empty one to OPTIONS.
    cdef HttpContext* context = session.context
    cdef const SiteC* site = &context.sites[session.site]
    cdef Writer writer
    cdef Writer lines
    cdef uint8_t* start
    cdef Slice extra
    cdef uint8_t[128] buffer
    cdef uint64_t body_bytes = 0
    if not open_writer(session, &writer, GENERATED_BYTES_MAX + site.header_bytes):
        return False
    start = writer.position
    if status == 204:
        put_status_line(&writer, 204)
        put_text(&writer, b"Server: kdaemon\r\nDate: ")
        put(&writer, context.date.text, HTTP_DATE_BYTES)
        put_text(&writer, b"\r\nAllow: GET, HEAD, OPTIONS\r\n")
        put_lines(session, &writer)
        put_end_of_head(&writer, session.keep_alive, session.minor_version)
    else:
        lines.position = buffer
        lines.end = buffer + sizeof(buffer)
        lines.overflow = False
        if status == 405:
            put_text(&lines, b"Allow: GET, HEAD, OPTIONS\r\n")
        elif status == 429:
            put_text(&lines, b"Retry-After: 1\r\n")
        elif status == 416:
            put_text(&lines, b"Content-Range: bytes */")
            put_decimal(&lines, context.ranges[0].length)
            put(&lines, b"\r\n", 2)
        extra.data = buffer
        extra.length = <uint32_t>(lines.position - buffer)
        body_bytes = put_error_with_lines(session, &writer, status, extra)
    commit_writer(session, &writer, start, status, body_bytes)
    return True


cdef uint64_t put_error_with_lines(HttpSession* session, Writer* writer, int status, Slice extra) noexcept nogil:
    cdef HttpContext* context = session.context
    cdef const SiteC* site = &context.sites[session.site]
    cdef uint8_t[4096] buffer
    cdef Writer lines
    if site.header_count != 0 and site.header_bytes + extra.length <= sizeof(buffer):
        lines.position = buffer
        lines.end = buffer + sizeof(buffer)
        lines.overflow = False
        put_slice(&lines, extra)
        put_lines(session, &lines)
        extra.data = buffer
        extra.length = <uint32_t>(lines.position - buffer)
    return put_error(writer, status, &context.date, extra, session.keep_alive, session.minor_version, session.head_only)


cdef bint refuse_request(HttpSession* session, int status, bint head_only, int minor_version) noexcept nogil:
    refresh_date(&session.context.date)
    session.keep_alive = False
    session.head_only = head_only
    session.minor_version = <uint8_t>minor_version
    session.context.request.path_length = 0                # nothing is known about a path: rules for every path apply
    return answer_status(session, status)


cdef bint answer_error(HttpSession* session, int status) noexcept nogil:
    # The site's own page for it, if it has one that can be read.
    cdef HttpContext* context = session.context
    cdef Slice page = error_page(&context.sites[session.site], status)
    cdef Entry* entry
    if page.data != NULL:
        entry = file_table_lookup(
            &context.table, session.site, page.data, page.length, context.transport.now_ns(session.connection))
        if entry.status == 200:
            return answer_representation(session, entry.representations[<int>ENCODING_IDENTITY], status)
    return answer_status(session, status)


cdef bint answer_location(HttpSession* session, int status, bint to_directory, Slice to, Slice star) noexcept nogil:
    cdef HttpContext* context = session.context
    cdef const SiteC* site = &context.sites[session.site]
    cdef Writer writer
    cdef uint8_t* start
    cdef uint32_t i
    cdef uint64_t room = GENERATED_BYTES_MAX + site.header_bytes + to.length + context.request.query.length
    room += 3 * <uint64_t>context.request.path_length
    if not open_writer(session, &writer, <uint32_t>room):
        return False
    start = writer.position
    put_status_line(&writer, status)
    put_text(&writer, b"Server: kdaemon\r\nDate: ")
    put(&writer, context.date.text, HTTP_DATE_BYTES)
    put_text(&writer, b"\r\nContent-Length: 0\r\nLocation: ")
    if to_directory:
        put_encoded_path(&writer, context.path, context.request.path_length)
        put(&writer, b"/", 1)
    else:
        for i in range(to.length):
            if to.data[i] == c'*':
                # "/old/*" to "/*" must not make "/old//host" a reference to another host.
                while star.length != 0 and star.data[0] == c'/' and (writer.position - 1)[0] == c'/':
                    star.data += 1
                    star.length -= 1
                put_encoded_path(&writer, star.data, star.length)
            else:
                put(&writer, &to.data[i], 1)
    put_slice(&writer, context.request.query)
    put(&writer, b"\r\n", 2)
    put_lines(session, &writer)
    put_end_of_head(&writer, session.keep_alive, session.minor_version)
    commit_writer(session, &writer, start, status, 0)
    return True


cdef bint answer_representation(HttpSession* session, Representation* representation, int status) noexcept nogil:
    # The whole with `status`; with status 200 the request's conditions and ranges apply.
    cdef HttpContext* context = session.context
    cdef Writer writer
    cdef uint8_t* start
    cdef int range_count = 0
    cdef uint64_t body_bytes = representation.file.size
    cdef bint conditional = (
        context.request.if_match.data != NULL or context.request.if_none_match.data != NULL
        or context.request.if_modified_since.data != NULL or context.request.if_unmodified_since.data != NULL
    )
    if status == 200 and representation.file.fd >= 0 and (conditional or context.request.range.data != NULL):
        representation_validators(representation, context.date.now_s, &context.validators)
        if conditional:
            status = evaluate_preconditions(&context.request, &context.validators)
            if status == 412:
                return answer_status(session, 412)
            if status == 0:
                status = 200
        if status == 200 and context.request.range.data != NULL and not session.head_only:
            range_count = select_ranges(
                &context.request, &context.validators, representation.file.size, context.limits.ranges_max,
                context.ranges)
            if range_count < 0:
                context.ranges[0].length = representation.file.size  # for the Content-Range of the error
                return answer_error(session, 416)
    if not open_writer(
        session, &writer, representation.head_length + representation.content_type.length + HEAD_EXTRA_BYTES_MAX
    ):
        return False
    start = writer.position
    if range_count == 1:
        body_bytes = context.ranges[0].length
    elif range_count > 1:
        body_bytes = multipart_length(representation, context.ranges, <uint32_t>range_count)
    if range_count > 0:
        status = 206
        context.boundary += 1
        put_ranges_head(session, &writer, representation, context.ranges, <uint32_t>range_count)
    elif status == 304:
        put_not_modified_head(session, &writer, representation)
    else:
        put_whole_head(session, &writer, representation, status)
    commit_writer(session, &writer, start, status, 0 if status == 304 or session.head_only else body_bytes)
    if status != 304 and not session.head_only and representation.file.size != 0:
        begin_response(session, representation, <uint32_t>range_count)
    return True


cdef void begin_response(HttpSession* session, Representation* representation, uint32_t range_count) noexcept nogil:
    cdef HttpContext* context = session.context
    session.multipart = range_count > 1
    session.range_count = range_count if range_count > 0 else 1
    session.range_index = 0
    session.range_done = 0
    session.part_started = False
    if range_count == 0:
        session.range.first = 0
        session.range.length = representation.file.size
    elif range_count == 1:
        session.range = context.ranges[0]
    else:
        session.boundary = context.boundary
        session.ranges = <ByteRange*>malloc(range_count * sizeof(ByteRange))
        if session.ranges == NULL:
            context.transport.close(session.connection, CLOSE_RESOURCES)
            session.finishing = True
            return
        memcpy(session.ranges, context.ranges, range_count * sizeof(ByteRange))
    representation_retain(representation)
    session.representation = representation
    session.responding = True
    continue_response(session)


cdef void end_response(HttpSession* session) noexcept nogil:
    session.responding = False
    representation_release(session.representation)
    session.representation = NULL
    free(session.ranges)
    session.ranges = NULL


cdef bint continue_range(HttpSession* session, const ByteRange* part) noexcept nogil:
    # True: the range is completely queued and more may follow at once.
    cdef HttpContext* context = session.context
    cdef Representation* representation = session.representation
    cdef uint64_t left = part.length - session.range_done
    cdef uint32_t room
    cdef uint8_t* start
    cdef int error
    if left == 0:
        return True
    if representation.content != NULL:
        room = context.transport.room(session.connection)
        if room > left:
            room = <uint32_t>left
        if room == 0:
            return False
        start = context.transport.reserve(session.connection, room)
        if start == NULL:
            return False
        memcpy(start, representation.content + part.first + session.range_done, room)
        context.transport.commit(session.connection, room)
        session.range_done += room
        return session.range_done == part.length
    if session.kernel_layer:
        representation_map(representation)
    representation.read_before = True
    error = context.transport.send_file(session.connection, &representation.file, part.first, part.length)
    if error < 0:
        context.transport.close(session.connection, CLOSE_RESOURCES)
        session.finishing = True
        return False
    session.range_done = part.length                       # nothing more may be queued until on_sent
    return False


cdef void continue_response(HttpSession* session) noexcept nogil:
    cdef const ByteRange* part
    cdef Writer writer
    cdef uint8_t* start
    while session.range_index < session.range_count and not session.finishing:
        part = &session.ranges[session.range_index] if session.multipart else &session.range
        if session.multipart and not session.part_started:
            if not open_writer(session, &writer, PART_HEAD_BYTES_MAX + session.representation.content_type.length):
                return
            start = writer.position
            put_part_head(session, &writer, part)
            session.context.transport.commit(session.connection, <uint32_t>(writer.position - start))
            session.part_started = True
        if not continue_range(session, part):
            return
        session.range_index += 1
        session.range_done = 0
        session.part_started = False
    if session.finishing:
        return
    if session.multipart:
        if not open_writer(session, &writer, END_BOUNDARY_BYTES):
            return
        start = writer.position
        put_end_boundary(&writer, session.boundary)
        session.context.transport.commit(session.connection, <uint32_t>(writer.position - start))
    end_response(session)


cdef bint answer_file(HttpSession* session) noexcept nogil:
    cdef HttpContext* context = session.context
    cdef const SiteC* site = &context.sites[session.site]
    cdef uint64_t now_ns = context.transport.now_ns(session.connection)
    cdef Entry* entry = file_table_lookup(
        &context.table, session.site, context.path, context.request.path_length, now_ns)
    cdef Representation* representation
    cdef Slice none
    if entry.status == 404 and site.fallback.data != NULL:
        entry = file_table_lookup(&context.table, session.site, site.fallback.data, site.fallback.length, now_ns)
    if entry.status == 301:
        memset(&none, 0, sizeof(none))
        return answer_location(session, 301, True, none, none)
    if entry.status != 200:
        return answer_error(session, entry.status)
    if entry.listing:
        return answer_representation(
            session, entry.representations[<int>preferred_format(context.request.accept)], 200)
    representation = entry.representations[
        select_encoding(context.request.accept_encoding, entry) if entry.encoded else <int>ENCODING_IDENTITY]
    # Small files are remembered with their content, and what is sent is what their ETag was made for. Of others the open file is asked
    # whether it is still what the head says: a file that was written to in place is opened anew.
    if not representation_load(representation) and not representation_is_current(representation):
        file_table_distrust(entry)
        entry = file_table_lookup(
            &context.table, session.site, entry.path, entry.path_length, now_ns)
        if entry.status != 200:
            return answer_error(session, entry.status)
        representation = entry.representations[<int>ENCODING_IDENTITY]
        representation_load(representation)
    return answer_representation(session, representation, 200)


cdef bint answer_request(HttpSession* session, const uint8_t* data, uint32_t length) noexcept nogil:
    cdef HttpContext* context = session.context
    cdef HttpRequest* request = &context.request
    cdef const SiteC* site = &context.sites[session.site]
    cdef const RedirectRuleC* redirect
    cdef BodyDiscard body
    cdef Slice star
    cdef uint8_t* start
    cdef bint answered
    cdef int status = parse_request_head(data, length, context.path, request)
    if status != 0:
        return refuse_request(session, status, False, request.minor_version)
    status = begin_body(request, &context.limits, &body)
    if status != 0:
        return refuse_request(session, status, request.method == METHOD_HEAD, request.minor_version)
    if request.expect_unknown:
        return refuse_request(session, 417, request.method == METHOD_HEAD, request.minor_version)
    refresh_date(&context.date)
    session.head_only = request.method == METHOD_HEAD
    session.minor_version = request.minor_version
    session.keep_alive = (
        request.keep_alive and not session.draining
        and session.requests + 1 < context.limits.requests_per_connection_max
    )
    if request.expect_continue and body.kind != BODY_NONE and request.minor_version != 0:
        if request.method == METHOD_OTHER:
            session.keep_alive = False                     # the final answer comes before the body, which may then never come
        else:
            start = context.transport.reserve(session.connection, 25 + GENERATED_BYTES_MAX)
            if start == NULL:
                return False
            memcpy(start, b"HTTP/1.1 100 Continue\r\n\r\n", 25)
            context.transport.commit(session.connection, 25)
    if session.address != NULL and not address_may_ask(
        &context.addresses, session.address, context.transport.now_ns(session.connection)
    ):
        answered = answer_error(session, 429)
    elif not site_answers_for(site, request.host):
        answered = answer_error(session, 421)
    elif request.method == METHOD_OPTIONS:
        answered = answer_status(session, 204)
    elif request.method == METHOD_OTHER:
        answered = answer_error(session, 405)
    else:
        redirect = find_redirect(site, context.path, request.path_length, &star)
        if redirect != NULL:
            answered = answer_location(session, redirect.status, False, redirect.to, star)
        else:
            answered = answer_file(session)
    if not answered:
        return False
    session.requests += 1
    session.body = body
    return True
