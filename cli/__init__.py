"""The command line of ilmconvert: library calls plus rendering."""
