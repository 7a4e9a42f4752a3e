"""The three stages that turn a seeded student into one that answers like its teacher (arXiv 2502.13145, section 3.3).

`layerwise` holds stages 1 and 2: each mixer learns its own layer's attention from the teacher's inputs and outputs.
`end_to_end` holds stage 3: the student learns the teacher's next-token distribution.
"""
