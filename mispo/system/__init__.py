"""Paths, files, signals and failures. Imports neither torch nor any other package of mispo."""
