"""One thin command for each stage that makes results of the papers; ``python -m papers.cli.<stage> --help``."""
