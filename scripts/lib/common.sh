# shellcheck shell=bash
# Shared by the scripts: sourced, never run. Everything said here goes to standard error.
# Expects nothing; sets REPOSITORY (absolute path of the checkout).

REPOSITORY=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
export REPOSITORY

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# Runs a command as root: directly, or through sudo without a prompt that nobody would answer.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "needs root for: $* (no sudo here; run that line as root, then run this again)"
    fi
}

# need_packages NAME...: installs the Debian packages that are missing, and says which.
need_packages() {
    local name installed missing=()
    if command -v dpkg-query >/dev/null; then
        installed=$(dpkg-query -W -f='${Package} ${db:Status-Status}\n' "$@" 2>/dev/null || true)
    fi
    for name; do
        grep -qx "$name installed" <<<"${installed:-}" || missing+=("$name")
    done
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || die "needs these packages, and there is no apt-get to install them: ${missing[*]}"
    say "installing ${missing[*]}"
    refresh_package_lists
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "${missing[@]}" </dev/null >&2 ||
        die "apt-get could not install ${missing[*]}"
}

# want_packages NAME...: the same for what the daemon is only better with; says so where they cannot be had (another architecture, no network).
want_packages() {
    (need_packages "$@") || say "going on without $*"
}

# A list fetched within the last hour is fresh enough; a new machine has none at all.
refresh_package_lists() {
    if [ -n "$(find /var/lib/apt/lists -maxdepth 1 -name '*Packages*' -mmin -60 -print -quit 2>/dev/null)" ]; then
        return
    fi
    as_root apt-get update -qq -o DPkg::Lock::Timeout=300 </dev/null >&2 ||
        die "apt-get update failed: is a package mirror reachable?"
    as_root touch /var/lib/apt/lists ||:
}

# Prints the interpreter to build with: Python >= 3.11 that has its headers. KDAEMON_PYTHON chooses one.
find_python() {
    local candidate
    for candidate in "${KDAEMON_PYTHON:-}" python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        [ -n "$candidate" ] || continue
        if command -v "$candidate" >/dev/null && "$candidate" - 2>/dev/null <<'PYTHON'
import pathlib, sys, sysconfig
include = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
sys.exit(not (sys.version_info >= (3, 11) and include.exists()))
PYTHON
        then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# ensure_venv: the checkout's .venv, made if there is none or if its interpreter is gone; sets VENV_PYTHON.
ensure_venv() {
    local python
    VENV_PYTHON=$REPOSITORY/.venv/bin/python
    "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 && return
    python=$(find_python) || {
        need_packages python3 python3-dev python3-venv
        python=/usr/bin/python3
    }
    # Debian packs ensurepip apart.
    "$python" -c 'import ensurepip' 2>/dev/null || need_packages python3-venv
    say "making .venv with $("$python" --version) ($python)"
    "$python" -m venv --clear "$REPOSITORY/.venv" || die "$python -m venv failed"
}

# venv_install REQUIREMENT...: into the checkout's .venv.
venv_install() {
    ensure_venv
    "$VENV_PYTHON" -m pip install --disable-pip-version-check --progress-bar off -qq "$@" </dev/null >&2 ||
        die "pip could not install $*"
}
