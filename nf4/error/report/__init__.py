"""The report of what four bits cost a model: measured, expected, drawn and written."""
