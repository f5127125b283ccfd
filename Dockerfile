# Three images:  docker build --target runtime -t kdaemon .       (what is run; also what plain `docker build` makes)
#                docker build --target test -t kdaemon-test .     (everything scripts/test needs, guest kernels included)
# Run:           docker run --rm --security-opt seccomp=docker/seccomp.json -p 8443:8443 -v "$PWD:/srv:ro" kdaemon
# Docker 25 and newer forbid io_uring in their default profile, hence the profile. docs/docker.md says more.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends \
        ca-certificates gcc libc6-dev liburing-dev libssl-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/kdaemon
WORKDIR /usr/src/kdaemon
COPY pyproject.toml setup.py README* LICENSE ./
COPY pyx pyx
COPY kdaemon kdaemon
COPY libtls libtls
# A checkout that was built in place brings its objects along; they belong to another Python.
RUN find . -name '*.so' -delete && /opt/kdaemon/bin/pip install --progress-bar off .

FROM ${BASE} AS runtime
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends python3 liburing2 libssl3 \
    && { [ "$(uname -m)" != x86_64 ] || apt-get install -y -qq --no-install-recommends libipsec-mb1; } \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --home-dir /var/lib/kdaemon --create-home --shell /usr/sbin/nologin kdaemon \
    && install -d -o kdaemon -g kdaemon /srv /run/kdaemon
COPY --from=build /opt/kdaemon /opt/kdaemon
# The self-signed certificate is made once and kept in the volume.
ENV PATH=/opt/kdaemon/bin:$PATH XDG_STATE_HOME=/var/lib/kdaemon XDG_RUNTIME_DIR=/run/kdaemon
VOLUME /var/lib/kdaemon
WORKDIR /srv
USER kdaemon
EXPOSE 8443
STOPSIGNAL SIGTERM
ENTRYPOINT ["kdaemon"]
CMD ["serve", "/srv", "--listen", "0.0.0.0:8443"]

FROM build AS test
COPY . .
RUN find . -name '*.so' -delete && scripts/test --prepare
# User-mode Linux traces its guest's processes and needs /tmp or /dev/shm with exec:
# docker run --rm --security-opt seccomp=unconfined --tmpfs /dev/shm:exec,size=4g kdaemon-test
CMD ["scripts/test"]

# What a plain `docker build .` gives.
FROM runtime
