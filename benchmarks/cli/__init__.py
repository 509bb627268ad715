"""The command `bilevax`."""
