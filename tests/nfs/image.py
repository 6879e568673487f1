"""What the virtual machines boot from: made of Debian's packages, once, without mounting anything.

    image = built()                     # a minute the first time; then it is there
    program(image, folder / "program")  # our own build and what it needs, in a second

The system is a minimal Debian of this machine's own release, with Python, nfsd and the NFS client; the kernel
is Debian's for clouds. Both are kept in build/nfs/ under the hash of this recipe. What changes more often,
this checkout's build and guest/, is on a second disk, which the machines have at /lab.
"""

from __future__ import annotations

import compileall
import hashlib
import inspect
import os
import platform
import py_compile
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import pkgindex

__all__ = ["PYTHON_PATH", "Image", "ImageFailed", "built", "program", "why_absent"]

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).resolve().parent / "guest"
CACHE = ROOT / "build" / "nfs"

#: What this needs here, and the package that has it.
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "cpio": "cpio",
    "depmod": "kmod",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}

#: What a machine has besides the essential packages.
PACKAGES = ("python3", "nfs-kernel-server", "nfs-common", "iproute2", "kmod", "mount", "procps")
KERNEL = "linux-image-cloud-amd64"

#: Modules that the initramfs needs to find disks and networks, if the kernel does not have them built in.
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "ext4")

#: Where pkgindex and what it needs are in a machine.
PYTHON_PATH = "/lab/python"

SYSTEM_SIZE, PROGRAM_SIZE = "1500M", "64M"


class ImageFailed(AssertionError):
    """A part could not be built; the message holds what was said last."""


@dataclass(frozen=True)
class Image:
    """What a machine boots from; nothing writes to it."""

    folder: Path

    @property
    def kernel(self) -> Path:
        return self.folder / "kernel"

    @property
    def initramfs(self) -> Path:
        return self.folder / "initramfs"

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    @property
    def python(self) -> str:
        """Its interpreter: "python3.11"."""
        return (self.folder / "python").read_text()


@cache
def why_absent() -> str | None:
    """Why this machine cannot run the virtual ones; None if it can, as far as can be told in no time."""
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: {package})"
    if platform.machine() != "x86_64":
        return f"the machines are x86_64, and this one is {platform.machine()}"
    if os.geteuid() != 0:
        return "their system can only be made by root"
    release = platform.freedesktop_os_release()
    if release.get("ID") != "debian":
        return f"their system is Debian's, and this one is {release.get('NAME')}"
    return None


def built() -> Image:
    """Return the image, and build it if it is not there. ImageFailed: a package cannot be had, as a rule."""
    recipe = [inspect.getsource(each) for each in (_build, _initramfs, _in_order)]
    recipe += [*PACKAGES, KERNEL, *MODULES, SYSTEM_SIZE, _release()]
    recipe += [(GUEST / "initramfs.sh").read_text()]
    folder = CACHE / hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as made:
            _build(Path(made))
            with suppress(OSError):  # another process was faster
                (Path(made) / "image").rename(folder)
    return Image(folder)


def _build(folder: Path) -> None:
    system, image = folder / "system", folder / "image"
    image.mkdir()
    lists = [*Path("/etc/apt").glob("sources.list"), *Path("/etc/apt/sources.list.d").iterdir()]
    sources = [str(path) for path in lists if path.suffix in (".list", ".sources")]
    included = f"--include={','.join(PACKAGES)}"
    _run("mmdebstrap", "--quiet", "--variant=apt", included, _release(), str(system), *sources)
    said = _run("apt-cache", "depends", "--important", KERNEL)
    package = next(
        word for word in said.split() if word.startswith("linux-image-") and word != KERNEL
    )
    _run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package, cwd=folder)
    (archive,) = folder.glob("linux-image-*.deb")
    _run("dpkg-deb", "-x", str(archive), str(folder / "linux"))
    (kernel,) = (folder / "linux/boot").glob("vmlinuz-*")
    release = kernel.name.removeprefix("vmlinuz-")
    shutil.move(kernel, image / "kernel")
    modules = system / "usr/lib/modules"
    modules.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / "linux/lib/modules" / release, modules / release)
    _run("depmod", "-b", str(system), release)
    for name in ("lab", "export", "mnt"):
        (system / name).mkdir(exist_ok=True)
    (image / "python").write_text(str((system / "usr/bin/python3").readlink()))
    _initramfs(folder / "first", modules / release, image / "initramfs")
    _disk(system, image / "disk", SYSTEM_SIZE)


def _initramfs(folder: Path, modules: Path, target: Path) -> None:
    for name in ("bin", "dev", "proc", "sys", "new", "modules"):
        (folder / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, folder / "bin")
    order = list(dict.fromkeys(_in_order(modules)))
    for path in order:
        shutil.copy(path, folder / "modules")
    (folder / "modules/order").write_text("".join(f"{path.name}\n" for path in order))
    shutil.copy(GUEST / "initramfs.sh", folder / "init")
    (folder / "init").chmod(0o755)
    _run("sh", "-c", f"find . | cpio --quiet -o -H newc | gzip -1 > '{target}'", cwd=folder)


def _in_order(modules: Path) -> Iterator[Path]:
    """Yield the files of MODULES, each behind those that it needs."""
    lines = (modules / "modules.dep").read_text().splitlines()
    needs = dict(line.split(":") for line in lines)
    for path, needed in needs.items():
        if Path(path).name.removesuffix(".ko") in MODULES:
            yield from (modules / each for each in [*reversed(needed.split()), path])


def program(image: Image, target: Path) -> None:
    """Make the second disk: guest/, and pkgindex as it is installed here, with what it needs."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if version not in (have := image.python):
        raise ImageFailed(f"{version} built pkgindex, and the machines have {have}")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for path in GUEST.iterdir():
            shutil.copy(path, folder)
        ignored = shutil.ignore_patterns("__pycache__", "*.pyx", "*.c")
        packages = Path(pkgindex.__file__).parent
        shutil.copytree(packages, folder / "python/pkgindex", ignore=ignored)
        for name in _needed("pkgindex"):
            found = metadata.distribution(name)
            for file in found.files or ():
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    to = folder / "python" / file
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(found.locate_file(file), to)
        # A disk that is only read takes no compiled files later, and compiling takes half a minute there.
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(folder, quiet=2, invalidation_mode=unchecked)
        _disk(folder, target, PROGRAM_SIZE)


def _needed(name: str) -> set[str]:
    """What a distribution requires, without its extras, and what that requires."""
    asked = [Requirement(line) for line in metadata.requires(name) or ()]
    found = {each.name for each in asked if not each.marker or each.marker.evaluate({"extra": ""})}
    return found.union(*map(_needed, found))


def _disk(folder: Path, target: Path, size: str) -> None:
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-d", str(folder), str(target), size)


@cache
def _release() -> str:
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def _run(*argv: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise ImageFailed(f"{argv[0]} failed: {' / '.join(said)}")
    return done.stdout
