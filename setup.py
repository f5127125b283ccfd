"""Builds the Cython engine.

``pyx/`` is a source root, not a package: the import name is ``kdaemon_pyx``, because PyPI's unrelated PyX
installs ``pyx``.
``KDAEMON_SANITIZE=address`` builds the extensions with AddressSanitizer, ``KDAEMON_DEBUG=1`` with assertions and -O1.
``KDAEMON_BUILD_JOBS`` compilers run at a time (default: one per CPU). ``KDAEMON_EXTENSIONS=0`` builds none:
scripts/lib/build.sh installs the editable package so and builds in place, compiling only what has changed.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).parent
SOURCES = Path("pyx") / "kdaemon_pyx"

JOBS = int(os.environ.get("KDAEMON_BUILD_JOBS") or os.cpu_count() or 1)

compile_args = ["-std=gnu11", "-Wall", "-Wno-unused-function", "-fno-strict-aliasing"]
link_args: list[str] = []
if os.environ.get("KDAEMON_DEBUG") == "1":
    compile_args += ["-O1", "-g"]
else:
    compile_args += ["-O3", "-DNDEBUG"]
if sanitizer := os.environ.get("KDAEMON_SANITIZE"):
    compile_args += [f"-fsanitize={sanitizer}", "-g", "-fno-omit-frame-pointer"]
    link_args += [f"-fsanitize={sanitizer}"]

extensions = [
    Extension(
        f"kdaemon_pyx.{path.stem}",
        [str(path)],
        include_dirs=[str(SOURCES)],
        libraries=["uring", "crypto"],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    for path in sorted((ROOT / SOURCES).glob("*.pyx"))
]
for extension in extensions:
    extension.sources = [str(Path(source).relative_to(ROOT)) if Path(source).is_absolute() else source
                         for source in extension.sources]

setup(
    packages=["kdaemon", "kdaemon.tls", "libtls", "kdaemon_pyx"],
    package_dir={"kdaemon_pyx": "pyx/kdaemon_pyx"},
    package_data={
        "kdaemon": ["py.typed"],
        "libtls": ["py.typed"],
        "kdaemon_pyx": ["*.pxd", "*.pyi", "*.h", "py.typed"],
    },
    options={"build_ext": {"parallel": JOBS}},
    ext_modules=[] if os.environ.get("KDAEMON_EXTENSIONS") == "0" else cythonize(
        extensions,
        include_path=["pyx"],
        nthreads=JOBS,
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "freethreading_compatible": True,
        },
    ),
)
