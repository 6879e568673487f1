"""The machine: what it is in words, who runs on which CPU, and who has used them."""

import os
import platform
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "bench"

SERVER_CPU = 0
GENERATOR_CPU = 1
ALL_CPUS = f"0-{(os.cpu_count() or 1) - 1}"

REST_SECONDS = 20.0  # that others may need to come to rest

_TICKS = os.sysconf("SC_CLK_TCK")


def compiled(source: str, *flags: str) -> Path:
    """The program made of a C file under benchmarks/, compiled if it is newer than the program."""
    path = HERE / source
    program = BUILD / path.stem
    if not program.exists() or program.stat().st_mtime < path.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC", "gcc")
        command = [
            compiler,
            "-std=gnu11",
            *(flags or ("-O2",)),
            "-Wall",
            "-o",
            str(program),
            str(path),
        ]
        subprocess.run(command, check=True)
    return program


def pinned(cpu: int | str, *command: str | Path) -> list[str]:
    """A command that runs on one CPU, or on a range of them, its threads and children too."""
    return ["taskset", "-c", str(cpu), *map(str, command)]


def _status(pid: str) -> tuple[int, float] | None:
    """The parent and the CPU seconds of a process."""
    try:
        fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), _ran(pid) or (int(fields[11]) + int(fields[12])) / _TICKS


def _ran(pid: str) -> float:
    """CPU seconds of a process's threads that live, to the nanosecond; 0 if the kernel does not tell."""
    seconds = 0.0
    for path in Path("/proc", pid, "task").glob("*/schedstat"):
        with suppress(OSError):
            seconds += int(path.read_text().split()[0]) / 1e9
    return seconds


def family(pid: int) -> dict[int, float]:
    """CPU seconds of a process and of its descendants that live."""
    names = (entry.name for entry in Path("/proc").iterdir())
    found = {int(name): seen for name in names if name.isdigit() and (seen := _status(name))}
    members = {pid} if pid in found else set()
    grew = True
    while grew:
        more = {p for p, (parent, _) in found.items() if parent in members} - members
        members |= more
        grew = bool(more)
    return {p: found[p][1] for p in members}


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process and its descendants have used."""
    return sum(family(pid).values())


def threads(pid: int) -> list[str]:
    """One line for each thread of a process: its CPU time, and how often it slept and was pushed aside."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name)):
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        switches = re.findall(r"ctxt_switches:\s+(\d+)", (task / "status").read_text())
        user, system = int(fields[11]) / _TICKS, int(fields[12]) / _TICKS
        name = (task / "comm").read_text().strip()
        slept, pushed = (int(number) for number in switches)
        lines.append(
            f"  {name:16} user {user:6.2f} s, system {system:6.2f} s,"
            f" slept {slept:,} and was pushed aside {pushed:,} times"
        )
    return lines


def machine_busy_seconds() -> float:
    """CPU seconds that were used on the whole machine, stolen time included."""
    fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / _TICKS


def rest() -> None:
    """Let the disk write what it has, and wait until nobody uses the machine, but not for ever.

    Millions of files keep the kernel busy for a while after the run that made them."""
    os.sync()
    deadline = time.monotonic() + REST_SECONDS
    while time.monotonic() < deadline:
        before = machine_busy_seconds()
        time.sleep(0.4)
        if machine_busy_seconds() - before < 0.04:
            return


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own: anonymous pages."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def available_bytes() -> int:
    """Memory that programs may still take."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def description() -> dict[str, object]:
    """In words that name no host and no path."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    release = Path("/etc/os-release")
    system = re.search(r'PRETTY_NAME="(.+)"', release.read_text()) if release.exists() else None
    hypervisor = "hypervisor" in cpuinfo
    return {
        "cpu": (model[1] if model else platform.machine())
        + (", virtual machine" if hypervisor else ""),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20) if memory else None,
        "system": system[1] if system else "Linux",
        "kernel": re.match(r"[\d.]*\d", platform.release())[0],  # type: ignore[index]
        "python": platform.python_version(),
        "file_system": file_system(BUILD),
    }


def file_system(path: Path) -> str:
    """The type of the file system that `path` is on."""
    path = path.resolve()
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, where, found, *_ = line.split()
        inside = path == Path(where) or Path(where) in path.parents
        if inside and len(where) >= len(best):
            best, kind = where, found
            if found == "ext4" and not any(Path("/proc/fs/jbd2").glob(f"{Path(device).name}-*")):
                kind = "ext4 without a journal"
    return kind
