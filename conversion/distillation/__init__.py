"""The stages that turn a seeded student into one that answers like its teacher (arXiv 2502.13145, section 3.3).

A recipe (`recipe`) is run by `run`: `stages` has its steps, `folder` its files, `data` the conversations. `layerwise`
trains each mixer on its own layer's attention (stages 1 and 2), `end_to_end` the student on the teacher's next-token
distribution (stage 3); `losses` has their common parts, `trainer` drives both.
"""
