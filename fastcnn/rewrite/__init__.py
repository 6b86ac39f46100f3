"""The forward of a network's own, rewritten so that layers called one after another run as one stage."""
