"""The quickstart's report: `python -m step3_rlhf.paper.quickstart DIRECTORY`."""
