"""One module per study; each has ``declare(config) -> Study``."""
