"""Everything that one run on a GPU measures: ``fused-resnet gpu``, a file a stage, and the report drawn from its results.

:mod:`.conductor` starts each stage as a process of its own (:mod:`.stage`), so that a launch that kills the device's context
loses a row and not the run. Rows go to one JSON file as they are made (:mod:`.results`); docs/gpu.md describes it.
"""
