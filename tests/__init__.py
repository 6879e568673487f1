"""The tests of pkgindex; `tests/conformance` judges any server that speaks the protocol."""
