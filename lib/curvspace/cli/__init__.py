"""One thin command for each stage of the pipeline; ``python -m curvspace.cli.<stage> --help``."""
