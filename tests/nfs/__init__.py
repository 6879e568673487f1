"""Real NFSv4.1 between real kernels: virtual machines under QEMU, on this machine alone.

One machine serves a folder with the kernel's own nfsd, two others mount it and run servers of ours. What
befalls them comes from outside, where no program of theirs has a hand in it: a link that is cut, a machine
that is frozen, one that loses its power.

    image.py      kernel, initramfs and disk, from Debian's packages, built once; our program on a disk beside
    machine.py    one machine: QEMU, its monitor, and commands run in it
    lab.py        the three, their networks, the export and the mounts
    remote.py     a `pkgindex serve` in a machine, as tests/servers.py has it here
    guest/        what runs inside
"""
