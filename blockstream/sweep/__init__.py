"""Many runs of one config: a run for each prompt, on one machine or many, gone on with whatever dies.

In: a config, prompts, a place for results, a scheduler; out: a run's folder for each, one report.
"""
