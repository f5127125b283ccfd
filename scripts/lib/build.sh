# shellcheck shell=bash
# Shared by serve and test: sourced after common.sh. Gets a checkout from nothing to runnable, and does nothing the second time.

# Both stamps live in .venv, so that removing .venv starts over.
stamp_matches() { [ "$(cat "$REPOSITORY/.venv/.kdaemon-$1" 2>/dev/null)" = "$2" ]; }
stamp() { printf '%s\n' "$2" >"$REPOSITORY/.venv/.kdaemon-$1"; }

digest() { sha256sum | cut -c 1-64; }

# prepare [EXTRA,EXTRA]: system packages, .venv, dependencies, the package itself (editable), the compiled engine.
prepare() {
    local extras=${1:-} started=$SECONDS lock dependencies sources
    need_packages gcc libc6-dev liburing-dev libssl-dev
    [ "$(uname -m)" != x86_64 ] || want_packages libipsec-mb1        # AES-GCM for the user-mode record layer (pyx/kdaemon_pyx/gcm.pyx)
    exec {lock}<"$REPOSITORY/setup.py"
    flock "$lock"
    ensure_venv

    dependencies=$({
        echo "$extras"
        "$VENV_PYTHON" --version
        cat "$REPOSITORY/pyproject.toml" "$REPOSITORY/setup.py"
    } | digest)
    # An earlier install with extras serves a later one without.
    if ! stamp_matches "dependencies-$extras" "$dependencies"; then
        say "installing the Python packages"
        install_dependencies "$extras"
        stamp "dependencies-$extras" "$dependencies"
    fi

    sources=$({
        echo "${KDAEMON_DEBUG:-} ${KDAEMON_SANITIZE:-}"
        "$VENV_PYTHON" --version
        cd "$REPOSITORY" && find setup.py pyx -type f \( -name '*.py' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.h' \) \
            -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    } | digest)
    if ! stamp_matches sources "$sources"; then
        say "building the engine (a minute or two the first time)"
        build_engine
        stamp sources "$sources"
    fi
    exec {lock}<&-
    [ $((SECONDS - started)) -lt 3 ] || say "ready after $((SECONDS - started)) s"
}

install_dependencies() {
    local requires
    # What pyproject.toml asks to build with is installed here once, instead of into a throw-away environment at every build.
    mapfile -t requires < <("$VENV_PYTHON" -c '
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")' "$REPOSITORY/pyproject.toml")
    venv_install "${requires[@]}"
    KDAEMON_EXTENSIONS=0 venv_install --no-build-isolation -e "$REPOSITORY${1:+[$1]}"
}

# Shows each module as it is translated and compiled; everything the compilers say is kept for a failure.
build_engine() {
    local log
    log=$(mktemp)
    if ! (cd "$REPOSITORY" && PYTHONUNBUFFERED=1 "$VENV_PYTHON" setup.py build_ext --inplace) 2>&1 | tee "$log" |
        sed -nu -e "s/^\\(\\[.*\\] Cythonizing\\) .*\\/\\(.*\\)/  \\1 \\2/p" -e "s/^building '\\(.*\\)' extension/  compiling \\1/p" >&2; then
        cat "$log" >&2
        rm -f "$log"
        die "the engine did not build: the compiler's words are above"
    fi
    rm -f "$log"
}
