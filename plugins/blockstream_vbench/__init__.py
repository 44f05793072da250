"""VBench for runs of blockstream: make its videos, name them as it expects, score them.

    blockstream vbench run movd.yaml --prompts prompts.json --out out/vbench/plain
    blockstream vbench prepare out/vbench/plain --to videos/plain
    blockstream vbench score videos/plain --vbench ~/vbench/bin/python

Seven of VBench's dimensions judge a video by itself (Huang et al., VBench, 2024). Prompts come from the
user's own copy: none are in this package. Only temporal flickering needs no weights.
"""
