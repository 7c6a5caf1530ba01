"""The names of the packages that gossamer continues, thin over its own."""
