"""The race under schedules: every optimiser tuned alike and trained to the end of a decaying rate. Our own study."""
