"""`python -m pkgindex`: the same as the `pkgindex` command."""

from pkgindex.cli import main

if __name__ == "__main__":
    main(prog_name="pkgindex")
