"""Core ML: every segment of the pipeline as a package, proven against the torch modules.

    tools      coremltools, imported quietly, or an error that says how to install it
    manifest   what an export folder holds: packages, functions, shapes, presets, order of visits
    segments*  the parts of T5, STDiT3 and the VAE as small modules on tensors of rank 5 at most
    convert    one module -> one package
    export     a config -> a folder
    verify     a folder against the torch modules

Only `tools` imports coremltools, and only when it is asked to.
"""
