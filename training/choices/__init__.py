"""Models of how people choose among responses: likelihoods as pure functions of scores."""
