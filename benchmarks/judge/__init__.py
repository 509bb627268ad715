"""The referee of finished runs, statistics over them, and the search for counterexamples."""
