"""Rewriting a network's own forward so that layers called one after another run as one stage."""
