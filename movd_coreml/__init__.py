"""Core ML: every segment of the pipeline as a package, proven against the torch modules.

    tools      coremltools, imported quietly, or an error that says how to install it
    manifest   what an export folder holds: packages, functions, shapes, presets, order of visits
    segments*  the parts of T5, STDiT3 and the VAE as small modules on tensors of rank 5 at most (and blocks)
    networks   the networks of a config as stages of segments; bound: their weights, a segment's at a time
    convert    one module -> one package; int8: what its rounded weights must be
    export     a config -> a folder
    verify     a folder against the torch modules; compare: how far they are apart
    interpreter, backend, packaged*, compiled, macos   packages evaluated with torch, and run by the engine

Only `tools` imports coremltools, and only when it is asked to.
"""
