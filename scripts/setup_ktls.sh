#!/usr/bin/env bash
# Checks and prepares this host for kernel TLS (kTLS): module, upper-layer protocol, ciphers, limits, io_uring's switch.
#
#   scripts/setup_ktls.sh [--user NAME]   prepares: loads modules, makes that last over a reboot, raises NAME's limits
#   scripts/setup_ktls.sh --check         changes nothing
#
# Safe to run again: what is in place is left alone. Root is needed for the changes only; without it each is explained
# instead. Needs nothing of the checkout, so it can be copied to a host by itself.
# Exit status: 0 if nothing is lacking (any more), 1 if something is, 2 for wrong usage.
set -u
export LC_ALL=C PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

MODULES_FILE=/etc/modules-load.d/kdaemon-ktls.conf
LIMITS_FILE=/etc/security/limits.d/90-kdaemon.conf
NOFILE_MIN=65536
MEMLOCK_MIN_KIB=8192

check='' user=${SUDO_USER:-}
while [ $# -gt 0 ]; do
    case $1 in
    --check) check=1 ;;
    --user) user=${2:?--user takes a name} && shift ;;
    -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
        exit 0
        ;;
    *)
        echo "${0##*/}: unknown argument $1 (--help tells the known ones)" >&2
        exit 2
        ;;
    esac
    shift
done

lacks=0
ok() { printf 'ok    %s\n' "$*"; }
note() { printf 'note  %s\n' "$*"; }
did() { printf 'did   %s\n' "$*"; }
# lack WHAT REMEDY
lack() {
    printf 'lack  %s\n      remedy: %s\n' "$1" "$2"
    lacks=$((lacks + 1))
}

may_change() { [ -z "$check" ] && [ "$(id -u)" -eq 0 ]; }

release=$(uname -r)
kernel_at_least() {
    local major minor
    IFS=.- read -r major minor _ <<<"$release"
    [ "$major" -gt "$1" ] || { [ "$major" -eq "$1" ] && [ "${minor%%[!0-9]*}" -ge "$2" ]; }
}

# y, m, n, or empty if this kernel's configuration is nowhere to be read.
config_of() {
    local line
    if [ -r /proc/config.gz ]; then
        line=$(zcat /proc/config.gz | grep -E "^(# )?$1[= ]")
    elif [ -r "/boot/config-$release" ]; then
        line=$(grep -E "^(# )?$1[= ]" "/boot/config-$release")
    else
        return
    fi
    case $line in
    "$1=y") echo y ;;
    "$1=m") echo m ;;
    *) echo n ;;
    esac
}

loadable() { command -v modprobe >/dev/null && modprobe -n -q "$1"; }
ulp_loaded() { grep -qw tls /proc/sys/net/ipv4/tcp_available_ulp 2>/dev/null; }

check_kernel() {
    if kernel_at_least 6 1; then
        ok "kernel $release (kdaemon needs 6.1: io_uring with DEFER_TASKRUN)"
    else
        lack "kernel $release is older than 6.1, which kdaemon's io_uring engine needs" "boot a newer kernel"
    fi
    # Orientation only: kdaemon doctor tries each of these.
    local feature
    for feature in "6.14 a KeyUpdate can be followed (rekey)" "6.19 TLS_TX_MAX_PAYLOAD_LEN"; do
        if kernel_at_least "${feature%%.*}" "$(cut -d' ' -f1 <<<"${feature#*.}")"; then
            ok "${feature#* } (mainline since ${feature%% *})"
        else
            note "${feature#* }: mainline since ${feature%% *}; without it everything else works"
        fi
    done
}

check_module() {
    if ulp_loaded; then
        ok "the TLS upper-layer protocol is there: $(cat /proc/sys/net/ipv4/tcp_available_ulp)"
        return
    fi
    case $(config_of CONFIG_TLS) in
    n)
        lack "this kernel is built without CONFIG_TLS: it cannot do kTLS" \
            "boot a kernel with CONFIG_TLS=m or y (the distributions' ordinary ones have it, some micro-VMs' do not)"
        return
        ;;
    esac
    if ! loadable tls; then
        lack "there is no module tls for kernel $release" \
            "install the kernel's modules (Debian: linux-image-..., Fedora: kernel-modules), or boot a kernel with CONFIG_TLS"
    elif may_change && modprobe tls && ulp_loaded; then
        did "loaded the module tls"
    else
        lack "the module tls is not loaded" "as root: modprobe tls"
    fi
}

# check_cipher TRANSFORM MODULE SUITES: registered, or a module that the kernel loads by itself on first use.
check_cipher() {
    if grep -qF "name         : $1" /proc/crypto; then
        ok "$3: $1 is registered"
    elif may_change && modprobe -q "$2" 2>/dev/null; then
        # A template like gcm appears in /proc/crypto on first use only; having its module is enough.
        if grep -qE "^$2 " /proc/modules 2>/dev/null && ! listed "$2"; then
            did "loaded the module $2 ($3)"
        else
            ok "$3: module $2 is available"
        fi
    elif loadable "$2"; then
        ok "$3: module $2 is available"
    else
        lack "$3: neither $1 nor a module $2" "install the kernel's extra crypto modules, or let clients negotiate another suite"
    fi
}

listed() { case " $loaded_before " in *" $1 "*) true ;; *) false ;; esac; }

check_persistence() {
    local wanted=("$@") text
    text=$(printf '%s\n' "# Written by setup_ktls.sh: modules kdaemon needs at boot." "${wanted[@]}")
    [ ${#wanted[@]} -gt 0 ] || return
    if [ -f "$MODULES_FILE" ] && [ "$(cat "$MODULES_FILE")" = "$text" ]; then
        ok "$MODULES_FILE loads ${wanted[*]} at boot"
    elif may_change && [ -d "${MODULES_FILE%/*}" ] && printf '%s\n' "$text" >"$MODULES_FILE"; then
        did "wrote $MODULES_FILE: ${wanted[*]} are loaded at boot"
    else
        note "after a reboot the modules are loaded on first use only; to have them at boot: $MODULES_FILE with ${wanted[*]}"
    fi
}

check_limits() {
    local nofile memlock account=${user:-$(id -un)}
    nofile=$(ulimit -Hn) memlock=$(ulimit -Hl)
    if [ "$nofile" = unlimited ] || [ "$nofile" -ge "$NOFILE_MIN" ] || [ "$account" = root ]; then
        ok "open files: hard limit $nofile"
    else
        limit nofile "$NOFILE_MIN" "open files: hard limit $nofile, one is used per connection" "$account"
    fi
    if [ "$memlock" = unlimited ] || [ "$memlock" -ge "$MEMLOCK_MIN_KIB" ] || [ "$(id -u)" -eq 0 ]; then
        ok "locked memory: hard limit $memlock KiB"
    else
        limit memlock "$MEMLOCK_MIN_KIB" "locked memory: hard limit $memlock KiB, which registered buffers count against" "$account"
    fi
}

# limit ITEM VALUE WHAT ACCOUNT
limit() {
    local line="$4 hard $1 $2" service
    service="systemd: Limit$(tr '[:lower:]' '[:upper:]' <<<"$1")=$2$([ "$1" = memlock ] && echo K)"
    if [ -f "$LIMITS_FILE" ] && grep -qxF "$line" "$LIMITS_FILE"; then
        note "$3; $LIMITS_FILE raises it at $4's next login (now: $service)"
    elif may_change && [ -d "${LIMITS_FILE%/*}" ] && printf '%s\n' "$line" >>"$LIMITS_FILE"; then
        did "wrote to $LIMITS_FILE: $line (from $4's next login; $service for a service)"
    else
        lack "$3" "as root: echo '$line' >>$LIMITS_FILE, then log in again; $service"
    fi
}

check_io_uring() {
    local disabled group
    disabled=$(cat /proc/sys/kernel/io_uring_disabled 2>/dev/null || echo 0)
    group=$(cat /proc/sys/kernel/io_uring_group 2>/dev/null || echo -1)
    case $disabled in
    0) ok "io_uring is open to every process" ;;
    1)
        if [ "$(id -u)" -eq 0 ] || id -G | tr ' ' '\n' | grep -qx "$group"; then
            note "io_uring is restricted (kernel.io_uring_disabled=1, group $group); this account may use it"
        else
            lack "io_uring is restricted (kernel.io_uring_disabled=1) and this account is not in group $group" \
                "as root: sysctl -w kernel.io_uring_group=GID with a group of kdaemon's account, or kernel.io_uring_disabled=0"
        fi
        ;;
    *) lack "io_uring is switched off (kernel.io_uring_disabled=$disabled)" "as root: sysctl -w kernel.io_uring_disabled=0" ;;
    esac
}

# What the kernel answers counts more than all of the above; a container may forbid what the host has.
check_by_trying() {
    local python answer
    python=$(command -v python3) || {
        note "no python3 here to try a TLS socket with"
        return
    }
    answer=$("$python" -c '
import errno, socket
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
try:
    client.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    print("ok")' 2>/dev/null)
    case $answer in
    ok) ok "a TCP socket takes the TLS protocol" ;;
    ENOENT) lack "a TCP socket does not take the TLS protocol (ENOENT)" "see above: the module is missing or not loaded" ;;
    '') note "no loopback connection to try a TLS socket with" ;;
    *) lack "a TCP socket does not take the TLS protocol ($answer)" "a sandbox, a container's seccomp profile or a security module forbids it" ;;
    esac
}

if [ -z "$check" ] && [ "$(id -u)" -ne 0 ]; then
    note "not root: nothing will be changed, each lack is explained"
fi
loaded_before=$(cut -d' ' -f1 /proc/modules 2>/dev/null | tr '\n' ' ')
check_kernel
check_module
check_cipher 'gcm(aes)' gcm "TLS_AES_128_GCM_SHA256, TLS_AES_256_GCM_SHA384"
check_cipher 'rfc7539(chacha20,poly1305)' chacha20poly1305 "TLS_CHACHA20_POLY1305_SHA256"
persistent=()
for module in tls gcm chacha20poly1305; do
    # Built-in ones have nothing to load.
    if modprobe -n --show-depends "$module" 2>/dev/null | grep -q ^insmod; then persistent+=("$module"); fi
done
check_persistence "${persistent[@]}"
check_io_uring
check_limits
check_by_trying

if [ "$lacks" -eq 0 ]; then
    echo "this host is ready for kernel TLS"
else
    echo "$lacks lacking: kdaemon still runs where io_uring works, with its own record layer in user space"
    exit 1
fi
