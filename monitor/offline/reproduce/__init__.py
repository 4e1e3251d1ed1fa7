"""The figures and tables of arXiv 2510.06640, measured anew: what `repflow reproduce` does.

`options` says what is asked for, `run` does it. `streams` measures models drawn at random and `checkpoints` trained
ones, both into a folder of work that a stopped run goes on from. Each target turns what was measured into rows
(`random_targets`, `depth_targets`, `tables`) that are written first; pictures and the page are drawn from what is
written, here or on another machine.
"""
