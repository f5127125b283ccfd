"""Answers: what a request gets, and how its response is put into the connection's output."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from kdaemon_pyx.files cimport ENCODING_IDENTITY, Entry, file_table_distrust, file_table_lookup
from kdaemon_pyx.http_address cimport address_may_ask
from kdaemon_pyx.http_body cimport BODY_NONE, BodyDiscard, begin_body
from kdaemon_pyx.http_conditional cimport evaluate_preconditions, select_ranges
from kdaemon_pyx.http_encoding cimport select_encoding
from kdaemon_pyx.http_head cimport (
    HEAD_EXTRA_BYTES_MAX, multipart_length, open_writer, put_not_modified_head, put_ranges_head, put_whole_head,
)
from kdaemon_pyx.http_log cimport log_line_format, log_line_write
from kdaemon_pyx.http_request cimport METHOD_HEAD, METHOD_OPTIONS, METHOD_OTHER, HttpRequest, Slice, parse_request_head
from kdaemon_pyx.http_response cimport (
    GENERATED_BYTES_MAX, Writer, put, put_decimal, put_encoded_path, put_end_of_head, put_error_body, put_error_head,
    put_server_and_date, put_slice, put_status_line, put_text, refresh_date,
)
from kdaemon_pyx.http_session cimport HttpContext, HttpSession
from kdaemon_pyx.http_site cimport (
    LINES_MAX, RedirectRuleC, SiteC, error_page, find_redirect, matching_lines, site_of_host,
)
from kdaemon_pyx.http_transfer cimport begin_transfer
from kdaemon_pyx.listing cimport preferred_format
from kdaemon_pyx.representation cimport (
    Representation, representation_is_current, representation_load, representation_validators,
)


cdef void commit_writer(
    HttpSession* session, Writer* writer, uint8_t* start, int status, uint64_t body_bytes, bint transfer_follows=False
) noexcept nogil:
    # Every response passes here once, with its head. Of a transfer the end decides what the log tells.
    cdef HttpContext* context = session.context
    context.transport.commit(session.connection, <uint32_t>(writer.position - start))
    context.responses[status // 100] += 1
    context.transport.count_request(session.connection)
    if context.log != NULL:
        log_line_format(
            context.log, &context.log_line, &context.date, &session.peer, &context.request, status, body_bytes)
        if not transfer_follows:
            log_line_write(context.log, &context.log_line)


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


cdef void put_status_fields(HttpSession* session, Writer* writer, int status) noexcept nogil:
    # What a response with this status must have, whatever its body is; then the site's fields.
    cdef HttpContext* context = session.context
    if status == 405 or status == 204:
        put_text(writer, b"Allow: GET, HEAD, OPTIONS\r\n")
    elif status == 429:
        put_text(writer, b"Retry-After: 1\r\n")
    elif status == 416:
        put_text(writer, b"Content-Range: bytes */")
        put_decimal(writer, context.ranges[0].length)
        put(writer, b"\r\n", 2)
    put_lines(session, writer)
    put_end_of_head(writer, session.keep_alive, session.minor_version)


cdef bint answer_status(HttpSession* session, int status) noexcept nogil:
    # A generated response: an error, or the empty one to OPTIONS.
    cdef HttpContext* context = session.context
    cdef Writer writer
    cdef uint8_t* start
    cdef uint64_t body_bytes = 0
    if not open_writer(session, &writer, GENERATED_BYTES_MAX + context.sites[session.site].header_bytes):
        return False
    start = writer.position
    if status == 204:
        put_status_line(&writer, 204)
        put_server_and_date(&writer, &context.date)
    else:
        body_bytes = put_error_head(&writer, status, &context.date)
    put_status_fields(session, &writer, status)
    if session.head_only:
        body_bytes = 0
    elif status != 204:
        put_error_body(&writer, status)
    commit_writer(session, &writer, start, status, body_bytes)
    return True


cdef bint answer_page(HttpSession* session, Representation* representation, int status) noexcept nogil:
    # The site's page for an error: without the validators that the page has as a file of its own.
    cdef HttpContext* context = session.context
    cdef Writer writer
    cdef uint8_t* start
    cdef uint64_t size = representation.file.size
    cdef bint transfer_follows = not session.head_only and size != 0
    if not open_writer(
        session, &writer, GENERATED_BYTES_MAX + context.sites[session.site].header_bytes + representation.type_length
    ):
        return False
    start = writer.position
    put_status_line(&writer, status)
    put_server_and_date(&writer, &context.date)
    put(&writer, representation.head + representation.type_start, representation.type_length)
    put_text(&writer, b"Content-Length: ")
    put_decimal(&writer, size)
    put(&writer, b"\r\n", 2)
    put_status_fields(session, &writer, status)
    commit_writer(session, &writer, start, status, 0 if session.head_only else size, transfer_follows)
    if transfer_follows:
        begin_transfer(session, representation, 0)
    return True


cdef bint refuse_request(HttpSession* session, int status) noexcept nogil:
    refresh_date(&session.context.date)
    session.keep_alive = False
    session.head_only = session.context.request.method == METHOD_HEAD
    session.minor_version = session.context.request.minor_version
    session.context.request.path_length = 0                # nothing is known about a path: rules for every path apply
    return answer_error(session, status)


cdef bint refuse_unread(HttpSession* session, int status, const uint8_t* data, uint64_t length) noexcept nogil:
    # Nothing was understood; for the log, what there is of a first line.
    cdef HttpRequest* request = &session.context.request
    memset(request, 0, sizeof(HttpRequest))
    request.minor_version = 1
    while length != 0 and (data[0] == c'\r' or data[0] == c'\n'):
        data += 1
        length -= 1
    request.line.data = data
    while request.line.length < length and data[request.line.length] != c'\r' and data[request.line.length] != c'\n':
        request.line.length += 1
    return refuse_request(session, status)


cdef bint answer_error(HttpSession* session, int status) noexcept nogil:
    # The site's own page for it, if it has one that can be read.
    cdef HttpContext* context = session.context
    cdef Slice page = error_page(&context.sites[session.site], status)
    cdef Representation* representation
    if page.data != NULL:
        representation = current_representation(
            session, file_table_lookup(
                &context.table, session.site, page.data, page.length, context.transport.now_ns(session.connection)),
            ENCODING_IDENTITY)
        if representation != NULL:
            return answer_page(session, representation, status)
    return answer_status(session, status)


cdef bint answer_location(HttpSession* session, int status, bint to_directory, Slice to, Slice star) noexcept nogil:
    cdef HttpContext* context = session.context
    cdef const SiteC* site = &context.sites[session.site]
    cdef Writer writer
    cdef uint8_t* start
    cdef uint32_t i
    cdef uint32_t before_fragment = 0                      # the request's query goes between
    cdef uint8_t query_mark = c'?'
    cdef Slice query = context.request.query
    cdef uint64_t room = GENERATED_BYTES_MAX + site.header_bytes + to.length + query.length
    room += 3 * <uint64_t>context.request.path_length
    if not open_writer(session, &writer, <uint32_t>room):
        return False
    start = writer.position
    put_status_line(&writer, status)
    put_server_and_date(&writer, &context.date)
    put_text(&writer, b"Content-Length: 0\r\nLocation: ")
    if to_directory:
        put_encoded_path(&writer, context.path, context.request.path_length)
        put(&writer, b"/", 1)
    else:
        while before_fragment < to.length and to.data[before_fragment] != c'#':
            before_fragment += 1
        for i in range(before_fragment):
            if to.data[i] == c'?':
                query_mark = c'&'
            if to.data[i] == c'*':
                # "/old/*" to "/*" must not make "/old//host" a reference to another host.
                while star.length != 0 and star.data[0] == c'/' and (writer.position - 1)[0] == c'/':
                    star.data += 1
                    star.length -= 1
                put_encoded_path(&writer, star.data, star.length)
            else:
                put(&writer, &to.data[i], 1)
    if query.length != 0:
        put(&writer, &query_mark, 1)
        put(&writer, query.data + 1, query.length - 1)
    put(&writer, to.data + before_fragment, to.length - before_fragment)
    put(&writer, b"\r\n", 2)
    put_lines(session, &writer)
    put_end_of_head(&writer, session.keep_alive, session.minor_version)
    commit_writer(session, &writer, start, status, 0)
    return True


cdef bint answer_representation(HttpSession* session, Representation* representation) noexcept nogil:
    cdef HttpContext* context = session.context
    cdef Writer writer
    cdef uint8_t* start
    cdef int status = 200
    cdef int range_count = 0
    cdef uint64_t body_bytes = representation.file.size
    cdef bint conditional = (
        context.request.if_match.data != NULL or context.request.if_none_match.data != NULL
        or context.request.if_modified_since.data != NULL or context.request.if_unmodified_since.data != NULL
    )
    if conditional or context.request.range.data != NULL:
        representation_validators(representation, context.date.now_s, &context.validators)
        if conditional:
            status = evaluate_preconditions(&context.request, &context.validators)
            if status == 412:
                return answer_error(session, 412)
            if status == 0:
                status = 200
        # An empty file has no range to give, and none to refuse: it is sent whole, as nginx does (RFC 9110 section 14.2 allows it).
        if (
            status == 200 and context.request.range.data != NULL and not session.head_only
            and body_bytes != 0 and representation.file.fd >= 0
        ):
            range_count = select_ranges(
                &context.request, &context.validators, body_bytes, context.limits.ranges_max, context.ranges)
            if range_count < 0:
                context.ranges[0].length = body_bytes      # for the Content-Range of the error
                return answer_error(session, 416)
    if not open_writer(session, &writer, representation.head_length + HEAD_EXTRA_BYTES_MAX):
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
        put_whole_head(session, &writer, representation)
    if status == 304 or session.head_only:
        body_bytes = 0
    commit_writer(session, &writer, start, status, body_bytes, body_bytes != 0)
    if body_bytes != 0:
        begin_transfer(session, representation, <uint32_t>range_count)
    return True


cdef Representation* current_representation(HttpSession* session, Entry* entry, int encoding) noexcept nogil:
    # Small files are remembered with their content, and what is sent is what their ETag was made for. Of others the open file is asked
    # whether it is still what the head says: a file that was written to in place is opened anew. NULL: not there, or not any more.
    cdef HttpContext* context = session.context
    cdef Representation* representation = entry.representations[encoding]
    if representation == NULL:
        return NULL
    if not representation_load(representation) and not representation_is_current(representation):
        file_table_distrust(entry)
        entry = file_table_lookup(
            &context.table, session.site, entry.path, entry.path_length, context.transport.now_ns(session.connection))
        representation = entry.representations[<int>ENCODING_IDENTITY]
        if representation != NULL:
            representation_load(representation)
    return representation


cdef bint answer_file(HttpSession* session) noexcept nogil:
    cdef HttpContext* context = session.context
    cdef const SiteC* site = &context.sites[session.site]
    cdef uint64_t now_ns = context.transport.now_ns(session.connection)
    cdef Entry* entry = file_table_lookup(
        &context.table, session.site, context.path, context.request.path_length, now_ns)
    cdef Representation* representation
    cdef Slice none
    if entry.status == 301:
        memset(&none, 0, sizeof(none))
        return answer_location(session, 301, True, none, none)
    if entry.status == 404 and site.fallback.data != NULL:
        entry = file_table_lookup(&context.table, session.site, site.fallback.data, site.fallback.length, now_ns)
        if entry.status == 301:                            # a folder is no fallback
            return answer_error(session, 404)
    if entry.status != 200:
        return answer_error(session, entry.status)
    if entry.listing:
        return answer_representation(session, entry.representations[<int>preferred_format(context.request.accept)])
    representation = current_representation(
        session, entry, select_encoding(&context.request, entry) if entry.encoded else ENCODING_IDENTITY)
    if representation == NULL:
        return answer_error(session, entry.status if entry.status != 200 else 404)
    return answer_representation(session, representation)


cdef bint answer_parsed(HttpSession* session) noexcept nogil:
    # context.request is wholly there, but for a body of known length.
    cdef HttpContext* context = session.context
    cdef HttpRequest* request = &context.request
    cdef const RedirectRuleC* redirect = NULL
    cdef Slice star
    cdef int64_t site = site_of_host(context.sites, session.site, request.host)
    cdef uint64_t now_ns = context.transport.now_ns(session.connection)
    cdef bint answered
    session.head_only = request.method == METHOD_HEAD
    session.minor_version = request.minor_version
    session.keep_alive = (
        request.keep_alive and not session.draining
        and session.requests + 1 < context.limits.requests_per_connection_max
        and now_ns - session.opened_ns < context.limits.connection_age_ns_max
        # Else the final answer comes before a body which then may never come.
        and not (request.expect_continue and request.method == METHOD_OTHER)
    )
    if session.by_host and site >= 0:
        session.site = <uint32_t>site
    if context.path[0] == c'/':                            # not "*"
        redirect = find_redirect(&context.sites[session.site], context.path, request.path_length, &star)
    if session.address != NULL and not address_may_ask(&context.addresses, session.address, now_ns):
        answered = answer_error(session, 429)
    elif site != session.site:
        answered = answer_error(session, 421)
    elif redirect != NULL:                                 # whatever the method: 307 and 308 keep it
        answered = answer_location(session, redirect.status, False, redirect.to, star)
    elif request.method == METHOD_OPTIONS:
        answered = answer_status(session, 204)
    elif request.method == METHOD_OTHER:
        answered = answer_error(session, 405)
    else:
        answered = answer_file(session)
    if answered:
        session.requests += 1
    return answered


cdef bint answer_request(HttpSession* session, const uint8_t* data, uint32_t length) noexcept nogil:
    cdef HttpContext* context = session.context
    cdef HttpRequest* request = &context.request
    cdef BodyDiscard body
    cdef uint8_t* start
    cdef uint8_t* kept
    cdef bint expecting
    cdef int status = parse_request_head(data, length, context.path, request)
    if status == 0:
        status = begin_body(request, &context.limits, &body)
    if status == 0 and request.expect_unknown:
        status = 417
    if status != 0:
        return refuse_request(session, status)
    refresh_date(&context.date)
    expecting = request.expect_continue and request.minor_version != 0 and body.kind != BODY_NONE
    if not expecting:
        request.expect_continue = False
    if expecting and request.method == METHOD_OTHER:
        expecting = False                                  # it gets its final answer at once
    elif expecting:
        start = context.transport.reserve(session.connection, 25 + GENERATED_BYTES_MAX)
        if start == NULL:
            return False
        memcpy(start, b"HTTP/1.1 100 Continue\r\n\r\n", 25)
        context.transport.commit(session.connection, 25)
    if expecting or (request.chunked and not request.expect_continue):
        # Whether a chunked body is well-formed and within its bound only its end tells: the answer waits for that.
        kept = <uint8_t*>malloc(length)
        if kept == NULL:
            return refuse_request(session, 503)
        memcpy(kept, data, length)
        session.waiting = kept
        session.waiting_length = length
    elif not answer_parsed(session):
        return False
    session.body = body
    return True


cdef bint answer_waiting(HttpSession* session, int status) noexcept nogil:
    cdef HttpContext* context = session.context
    cdef bint answered
    parse_request_head(session.waiting, session.waiting_length, context.path, &context.request)
    context.request.expect_continue = False
    refresh_date(&context.date)
    answered = refuse_request(session, status) if status != 0 else answer_parsed(session)
    if answered:
        free(session.waiting)
        session.waiting = NULL
    return answered
