"""The guest kernels of scripts/guest: where each comes from, and the packages around it.

Debian's packages are unpacked into the user's cache, never installed: no boot loader, no initramfs.
"""

import contextlib
import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

SCRIPTS = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdaemon" / "guest"
UML_BINARY = Path("/usr/bin/linux.uml")
UML_MODULES = Path("/usr/lib/uml/modules")
GUEST_FAILED = 125
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BACKPORTS = "trixie-backports"  # whose kernel is the newest that Debian has for a released system


class Kernel(NamedTuple):
    """kind: "uml" or "qemu"; image: UML binary or bzImage; modules: folder with modules.dep, None: all built in."""

    kind: str
    image: Path
    modules: Path | None
    release: str


def say(text: str) -> None:
    print(f"guest: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    say(text)
    sys.exit(GUEST_FAILED)


def shell(function: str, *arguments: str) -> None:
    """Calls a function of scripts/lib/common.sh."""
    script = f'. "{SCRIPTS}/lib/common.sh"; {function} "$@"'
    if subprocess.run(["bash", "-c", script, "guest", *arguments], check=False, stdin=subprocess.DEVNULL).returncode:
        fail(f"{function} {' '.join(arguments)} failed")


def need_programs(packages: dict[str, str]) -> None:
    """Program -> Debian package that has it."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = [package for program, package in packages.items() if not shutil.which(program, path=path)]
    if missing:
        shell("need_packages", *missing)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_kernel(name: str) -> Kernel:
    if name == "uml":
        need_programs({str(UML_BINARY): "user-mode-linux", "modprobe": "kmod", "ip": "iproute2"})
        return uml_kernel(UML_BINARY)
    if name == "qemu":
        return bzimage_kernel(debian_kernel())
    if name == "qemu-new":
        return bzimage_kernel(newest_kernel())
    path = Path(name).resolve()
    if not path.is_file():
        fail(f"--kernel {name}: neither uml, qemu, qemu-new, nor a file")
    with path.open("rb") as file:
        start = file.read(0x206)
    if start[:4] == b"\x7fELF":
        return uml_kernel(path)
    if start[0x202:] == b"HdrS":
        return bzimage_kernel(path)
    fail(f"{path} is neither a user-mode Linux binary (ELF) nor a bzImage")


def uml_kernel(binary: Path) -> Kernel:
    release = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    if not re.match(r"\d+\.\d+", release):
        fail(f"{binary} --version does not print a kernel version: is it a user-mode Linux binary?")
    candidates = [UML_MODULES / release, *(parent / "lib/modules" / release for parent in binary.parents)]
    modules = next((path for path in candidates if (path / "modules.dep").exists()), None)
    return Kernel("uml", binary, modules, release)


def bzimage_kernel(image: Path) -> Kernel:
    with image.open("rb") as file:
        file.seek(0x20E)  # kernel_version of the boot protocol: offset of the version string, less 0x200
        file.seek(struct.unpack("<H", file.read(2))[0] + 0x200)
        release = file.read(128).split(b"\0")[0].split(b" ")[0].decode()
    candidates = [parent / "lib/modules" / release for parent in image.parents]
    return Kernel("qemu", image, next((path for path in candidates if path.is_dir()), None), release)


def version_key(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def debian_kernel() -> Path:
    """Debian 12's newest 6.12 kernel."""
    with locked("debian-kernel"):
        unpacked = unpacked_kernels("linux-image-6.12")
        if not unpacked:
            shell("refresh_package_lists")
            found = subprocess.run(
                ["apt-cache", "search", "--names-only", r"^linux-image-6\.12\..*deb12-amd64-unsigned$"],
                capture_output=True, text=True, check=True,
            ).stdout.split("\n")  # fmt: skip
            names = sorted((line.split()[0] for line in found if line), key=version_key)
            if not names:
                fail("no linux-image-6.12.*deb12-amd64-unsigned to install: add bookworm-security to apt's sources")
            unpack(names[-1], [names[-1]], [])
            unpacked = unpacked_kernels("linux-image-6.12")
        return unpacked[-1]


def newest_kernel() -> Path:
    """The newest kernel of Debian's backports. The host's mirror is used, its package lists stay as they are."""
    with locked("newest-kernel"):
        unpacked = unpacked_kernels("backports-")
        if not unpacked:
            options = backports_lists()
            image = dependencies("linux-image-amd64", options, r"linux-image-\d")
            if not image:
                fail(f"no linux-image-amd64 in {BACKPORTS}: does this mirror have it?")
            # Since 7.0 the image package is empty and depends on the packages with the image and the modules.
            parts = [*image, *dependencies(image[0], options, r"linux-(?:base|binary|modules)-\d")]
            unpack(f"backports-{image[0]}", parts, options)
            unpacked = unpacked_kernels("backports-")
        return unpacked[-1]


def unpacked_kernels(prefix: str) -> list[Path]:
    images = [*CACHE.glob(f"{prefix}*/boot/vmlinuz-*"), *CACHE.glob(f"{prefix}*/lib/modules/*/vmlinuz")]
    return sorted(images, key=lambda path: version_key(path.parts[len(CACHE.parts)]))


def backports_lists() -> list[str]:
    """Fetches the package list of BACKPORTS into the cache; the options that make apt use it and nothing else."""
    shell("refresh_package_lists")
    sites = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE) $(ORIGIN) $(CODENAME)", "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    site = next((line.split()[0] for line in sites if line.endswith(" Debian bookworm")), None)
    if not site:
        fail("apt's sources do not name Debian bookworm: from which mirror should the backported kernel come?")
    state = CACHE / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "sources.list").write_text(f"deb [signed-by={KEYRING}] {site} {BACKPORTS} main\n")
    options = ["APT::Sandbox::User=root", f"Dir::Etc::sourcelist={state}/sources.list", "Dir::Etc::sourceparts=-",
               f"Dir::State::lists={state}/lists", f"Dir::Cache={state}/cache"]  # fmt: skip
    options = [argument for option in options for argument in ("-o", option)]
    say(f"fetching the package list of {BACKPORTS}")
    if subprocess.run(["apt-get", *options, "update", "-qq"], stdout=sys.stderr, check=False).returncode:
        fail(f"apt-get could not fetch the package list of {BACKPORTS}")
    return options


def dependencies(package: str, options: list[str], pattern: str) -> list[str]:
    """Names of the packages that `package` depends on and that begin with `pattern`."""
    said = subprocess.run(
        ["apt-cache", *options, "depends", "--important", package], capture_output=True, text=True, check=False
    ).stdout
    return re.findall(rf"Depends: ({pattern}\S*)", said)


def unpack(name: str, packages: list[str], options: list[str]) -> None:
    """Downloads Debian packages of one kernel and unpacks them into CACHE/name, its modules below lib/modules."""
    need_programs({"depmod": "kmod"})
    say(f"fetching {' '.join(packages)}")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-") as folder:
        subprocess.run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *options, *packages],
                       cwd=folder, check=True, stdout=sys.stderr)  # fmt: skip
        tree = Path(folder) / "tree"
        for package in sorted(Path(folder).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, tree], check=True)
        if not (tree / "lib").exists():
            (tree / "lib").symlink_to("usr/lib")
        release = next((tree / "lib/modules").iterdir()).name
        subprocess.run(["depmod", "-b", tree, release], check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
        tree.rename(CACHE / name)
