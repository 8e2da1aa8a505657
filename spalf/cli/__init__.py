"""The command line: reads YAML, seeds generators, picks devices, and calls the steps."""
