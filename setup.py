"""The compiled extensions of pkgindex; everything else is in pyproject.toml.

Each build translates the Cython source anew: a `.c` left over from other directives, another Cython
or the debug build is never reused. The C goes to the build directory, so the tree stays clean.

Environment:
    PKGINDEX_DEBUG=1     -O1 -g, assertions and bounds checks on, `PKGINDEX_DEBUG` defined for the C
    PKGINDEX_SANITIZE=1  AddressSanitizer and UndefinedBehaviorSanitizer (preload libasan)
"""

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("PKGINDEX_DEBUG", "0") not in ("", "0")
SANITIZE = os.environ.get("PKGINDEX_SANITIZE", "0") not in ("", "0")

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": DEBUG,
    "embedsignature": True,
}

# No -march=native: the result must run on machines other than the one that built it.
# No -flto: each extension is one translation unit, so there is nothing to optimize across.
if DEBUG:
    compile_args = ["-O1", "-g", "-UNDEBUG"]
    macros = [("PKGINDEX_DEBUG", "1")]
else:
    compile_args = ["-O3", "-g0"]  # Python's own flags say -g: four fifths of the file's size
    macros = [("CYTHON_WITHOUT_ASSERTIONS", "1")]
link_args = []
if SANITIZE:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    compile_args += [*sanitizers, "-g", "-fno-omit-frame-pointer"]
    link_args += sanitizers


def check_platform() -> None:
    """Stop with one line on a machine for which pkgindex is not made."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64") or sys.maxsize < 2**32:
        bits = sys.maxsize.bit_length() + 1
        sys.exit(
            "pkgindex: runs on 64-bit Linux on x86-64 or arm64 only; "
            f"this is {bits}-bit Python for {sys.platform} on {machine}"
        )


def check_tools() -> None:
    """Stop with one line that names the Debian package of a build tool that is missing."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc")[0]
    if shutil.which(compiler) is None:
        sys.exit(f"pkgindex: no C compiler {compiler!r}; on Debian: apt-get install gcc")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        version = "3" if sys.executable.endswith("python3") else sysconfig.get_python_version()
        sys.exit(f"pkgindex: no {header}; on Debian: apt-get install python{version}-dev")


class Build(build_ext):
    """Check the machine, translate every `.pyx`, then compile as usual."""

    def run(self) -> None:
        check_platform()
        check_tools()
        # Late: naming the missing compiler needs no Cython, nor does making an sdist.
        from Cython.Build import cythonize

        for extension in self.extensions:
            (translated,) = cythonize(
                [extension],
                build_dir=self.build_temp,
                compiler_directives=DIRECTIVES,
                emit_linenums=DEBUG,
                force=True,
            )
            extension.sources = translated.sources
        self.parallel = self.parallel or True
        super().run()


def extension(source: str, *, parts: str) -> Extension:
    """Describe one extension module; `parts` is a glob of the files that its source includes."""
    return Extension(
        source.rpartition(".")[0].replace("/", "."),
        [source],
        depends=sorted([*glob(parts), *glob("pkgindex/*.h")]),
        include_dirs=["pkgindex"],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        extension("pkgindex/_core.pyx", parts="pkgindex/_*.px[id]"),
        extension("pkgindex/store/_disk.pyx", parts="pkgindex/store/_*.px[id]"),
        extension("pkgindex/protocol.py", parts="pkgindex/*.pxd"),  # by the types in protocol.pxd
    ],
)
