"""The command line, suites, referee and reports."""
