"""Text to video, whatever the model: prompts are embedded, denoised, decoded, stages of one schedule.

In: a family (its options, networks, flows and decoder). Out: videos, and a run that goes on where it was.
"""
