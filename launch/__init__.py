"""Command line, recipes and the runtime; the only package that imports ray."""
