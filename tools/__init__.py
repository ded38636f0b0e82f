"""The programs that users run, and their parts."""
