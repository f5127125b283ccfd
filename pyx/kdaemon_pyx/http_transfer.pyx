"""The body of a response, in steps: from memory, by the connection's file range, or as parts of multipart/byteranges."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from kdaemon_pyx.core cimport CLOSE_RESOURCES
from kdaemon_pyx.http_conditional cimport ByteRange
from kdaemon_pyx.http_head cimport END_BOUNDARY_BYTES, PART_HEAD_BYTES_MAX, open_writer, put_end_boundary, put_part_head
from kdaemon_pyx.http_log cimport log_line_keep, log_line_write
from kdaemon_pyx.http_response cimport Writer
from kdaemon_pyx.http_session cimport HttpContext, HttpSession
from kdaemon_pyx.representation cimport Representation, representation_map, representation_release, representation_retain


cdef void begin_transfer(HttpSession* session, Representation* representation, uint32_t range_count) noexcept nogil:
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
            if context.log != NULL:
                context.log_line.body_bytes = 0
                log_line_write(context.log, &context.log_line)
            context.transport.close(session.connection, CLOSE_RESOURCES)
            session.finishing = True
            return
        memcpy(session.ranges, context.ranges, range_count * sizeof(ByteRange))
    representation_retain(representation)
    session.representation = representation
    session.responding = True
    continue_transfer(session)
    if context.log != NULL:
        if session.responding:                             # its line waits for the end
            session.log_line = log_line_keep(&context.log_line)
        if session.log_line == NULL:
            log_line_write(context.log, &context.log_line)


cdef uint64_t body_bytes_sent(const HttpSession* session) noexcept nogil:
    # Of a transfer under way; the heads of parts do not count.
    cdef const ByteRange* part = &session.ranges[session.range_index] if session.multipart else &session.range
    cdef uint64_t total = session.range_done
    cdef uint32_t i
    if session.representation.content == NULL and session.range_done != 0:
        total = session.context.transport.file_position(session.connection) - part.first
    for i in range(session.range_index if session.multipart else 0):
        total += session.ranges[i].length
    return total


cdef void end_transfer(HttpSession* session) noexcept nogil:
    session.responding = False
    representation_release(session.representation)
    session.representation = NULL
    free(session.ranges)
    session.ranges = NULL
    if session.log_line != NULL:
        log_line_write(session.context.log, session.log_line)
        free(session.log_line)
        session.log_line = NULL


cdef void abandon_transfer(HttpSession* session) noexcept nogil:
    if session.representation == NULL:
        return
    if session.log_line != NULL:
        session.log_line.body_bytes = body_bytes_sent(session)
    end_transfer(session)


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


cdef void continue_transfer(HttpSession* session) noexcept nogil:
    cdef const ByteRange* part
    cdef Writer writer
    cdef uint8_t* start
    while session.range_index < session.range_count and not session.finishing:
        part = &session.ranges[session.range_index] if session.multipart else &session.range
        if session.multipart and not session.part_started:
            if not open_writer(session, &writer, PART_HEAD_BYTES_MAX + session.representation.type_length):
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
    end_transfer(session)
