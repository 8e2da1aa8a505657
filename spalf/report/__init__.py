"""From evaluation files to tables and figures. Reads and writes files; needs no torch."""
