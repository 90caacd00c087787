"""Paper C: CurveBall."""
