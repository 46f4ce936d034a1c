"""Reports of a run for its user, made from events and files only: terminal output, tables, figures, HTML page."""
