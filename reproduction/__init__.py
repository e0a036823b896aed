"""The paper's claims, tested on the safe world: python -m reproduction --help, and README.md."""
