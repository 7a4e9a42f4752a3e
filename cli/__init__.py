"""The command line `mmmamba`."""
