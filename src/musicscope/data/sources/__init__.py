"""Real data sets as clip stores: a module per source, which scans its metadata, and the build."""
