"""Training: one loop for all optimisers (:mod:`~curvspace.training.loop`), what a run is
(:mod:`~curvspace.training.spec`), what it leaves behind (:mod:`~curvspace.training.record`)."""
