"""Real people's answers as a population: `bash scripts/people.sh`, `python -m step3_rlhf.paper.people`."""
