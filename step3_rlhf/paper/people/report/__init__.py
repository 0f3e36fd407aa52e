"""The experiment's report: report.html, report.json and its pictures."""
