"""The report: an HTML page with figures, tables and sentences about a study."""
