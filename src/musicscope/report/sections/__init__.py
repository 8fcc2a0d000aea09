"""Sections of the report: each module reads files and returns plain data.

The text around the data is in templates/<section>.jinja. A missing file or key becomes a visible
note or a dash, never an error: the page must also show a pipeline that ran in part.
"""
