"""MindSpore's own Ascend backend on a machine without an Ascend, and without CANN.

`build` makes stand-ins for CANN's libraries: functions that answer nothing, the few classes and
functions whose answers matter, and an operator library that writes every call down. With them and
MindSpore's simulation, graphs are compiled for the 910B: passes, selection of kernels, shapes, the
plan of memory, and the call that prepares each operator are the real ones. Nothing is computed:
every number is 0. `dry_run` runs commands of sdxl-host so, and says what was called; `calls` holds
the calls against what CANN's published sources say that the 910B takes.
"""
