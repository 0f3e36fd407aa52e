"""Real people's answers as a population: the experiment of `bash scripts/people.sh`."""
