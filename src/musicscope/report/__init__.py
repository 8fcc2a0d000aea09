"""metrics/summary.json and the report page."""
