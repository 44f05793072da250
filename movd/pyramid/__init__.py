"""Pyramidal Flow (miniFLUX): latent frames one after another, each from coarse to fine, beside those made.

In: folders as they are published. Out: networks under their official keys, flows, frames.
"""
