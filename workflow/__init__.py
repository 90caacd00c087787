"""What the Snakefile is made of, as plain Python: studies, job specs, code hashes, config checks."""
